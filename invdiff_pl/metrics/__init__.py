"""Measures of bias and image quality, as torchmetrics and as plain functions."""

from invdiff_pl.metrics.accuracy import PromptAccuracy
from invdiff_pl.metrics.bias import (
    BiasScore,
    DeviationRatio,
    FairnessDiscrepancy,
    KLDivergence,
    NormalizedEntropy,
    ParityGap,
    bias_statistics,
    measured,
    small_sample_bias,
)
from invdiff_pl.metrics.correction import CorrectedRates, correct_for_classifier, corrected_bias
from invdiff_pl.metrics.counts import check_target
from invdiff_pl.metrics.discrepancy import MaximumMeanDiscrepancy, squared_discrepancy
from invdiff_pl.metrics.extractors import (
    Dinov2,
    EfficientNetLite0,
    FeatureExtractor,
    InceptionV3,
    MissingWeightsError,
    build_extractor,
)
from invdiff_pl.metrics.frechet import FeatureStatistics, FrechetDistance, frechet_distance
from invdiff_pl.metrics.intervals import (
    mean_interval,
    mean_share_interval,
    proportion_interval,
    share_interval,
    wilson_interval,
)
from invdiff_pl.metrics.manifold import ManifoldScores, manifold_scores
from invdiff_pl.metrics.measures import MEASURES, Measure, pairwise_bias

__all__ = [
    "MEASURES",
    "BiasScore",
    "CorrectedRates",
    "DeviationRatio",
    "Dinov2",
    "EfficientNetLite0",
    "FairnessDiscrepancy",
    "FeatureExtractor",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionV3",
    "KLDivergence",
    "ManifoldScores",
    "MaximumMeanDiscrepancy",
    "Measure",
    "MissingWeightsError",
    "NormalizedEntropy",
    "ParityGap",
    "PromptAccuracy",
    "bias_statistics",
    "build_extractor",
    "check_target",
    "correct_for_classifier",
    "corrected_bias",
    "frechet_distance",
    "manifold_scores",
    "mean_interval",
    "mean_share_interval",
    "measured",
    "pairwise_bias",
    "proportion_interval",
    "share_interval",
    "small_sample_bias",
    "squared_discrepancy",
    "wilson_interval",
]
