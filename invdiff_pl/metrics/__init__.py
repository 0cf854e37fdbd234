"""Measures of bias and image quality, as torchmetrics and as plain functions."""

from invdiff_pl.metrics.accuracy import PromptAccuracy
from invdiff_pl.metrics.bias import BiasScore, bias_statistics, check_target, small_sample_bias
from invdiff_pl.metrics.correction import CorrectedRates, correct_for_classifier, corrected_bias
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
from invdiff_pl.metrics.intersection import IntersectionalBias
from invdiff_pl.metrics.intervals import (
    bias_interval,
    mean_bias_interval,
    mean_interval,
    pairwise_bias,
    proportion_interval,
    wilson_interval,
)
from invdiff_pl.metrics.manifold import ManifoldScores, manifold_scores

__all__ = [
    "BiasScore",
    "CorrectedRates",
    "Dinov2",
    "EfficientNetLite0",
    "FeatureExtractor",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionV3",
    "IntersectionalBias",
    "ManifoldScores",
    "MaximumMeanDiscrepancy",
    "MissingWeightsError",
    "PromptAccuracy",
    "bias_interval",
    "bias_statistics",
    "build_extractor",
    "check_target",
    "correct_for_classifier",
    "corrected_bias",
    "frechet_distance",
    "manifold_scores",
    "mean_bias_interval",
    "mean_interval",
    "pairwise_bias",
    "proportion_interval",
    "small_sample_bias",
    "squared_discrepancy",
    "wilson_interval",
]
