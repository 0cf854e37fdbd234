"""Lightning callbacks: evaluation, image grids, averaging."""

from invdiff_pl.callbacks.dashboard import Dashboard
from invdiff_pl.callbacks.ema import ExponentialMovingAverage
from invdiff_pl.callbacks.evaluation import SampleEvaluation
from invdiff_pl.callbacks.fit_evaluation import FitEvaluation
from invdiff_pl.callbacks.grids import SampleGrid

__all__ = [
    "Dashboard",
    "ExponentialMovingAverage",
    "FitEvaluation",
    "SampleEvaluation",
    "SampleGrid",
]
