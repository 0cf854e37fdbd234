"""Lightning callbacks: evaluation, image grids, averaging."""

from invdiff_pl.callbacks.ema import ExponentialMovingAverage
from invdiff_pl.callbacks.evaluation import SampleEvaluation
from invdiff_pl.callbacks.grids import SampleGrid

__all__ = ["ExponentialMovingAverage", "SampleEvaluation", "SampleGrid"]
