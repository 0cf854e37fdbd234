"""Measures of bias and image quality, as torchmetrics and as plain functions."""

from invdiff_pl.metrics.bias import BiasScore, bias_statistics, small_sample_bias
from invdiff_pl.metrics.extractors import (
    EfficientNetLite0,
    FeatureExtractor,
    InceptionV3,
    build_extractor,
)
from invdiff_pl.metrics.frechet import FeatureStatistics, FrechetDistance, frechet_distance
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
    "EfficientNetLite0",
    "FeatureExtractor",
    "FeatureStatistics",
    "FrechetDistance",
    "InceptionV3",
    "ManifoldScores",
    "bias_interval",
    "bias_statistics",
    "build_extractor",
    "frechet_distance",
    "manifold_scores",
    "mean_bias_interval",
    "mean_interval",
    "pairwise_bias",
    "proportion_interval",
    "small_sample_bias",
    "wilson_interval",
]
