"""Lightning callbacks: evaluation, image grids, averaging, and what keeps a run from harm."""

from invdiff_pl.callbacks.ema import ExponentialMovingAverage
from invdiff_pl.callbacks.evaluation import SampleEvaluation
from invdiff_pl.callbacks.grids import SampleGrid
from invdiff_pl.callbacks.safety import StopOnDivergence, StopOnSigterm

__all__ = [
    "ExponentialMovingAverage",
    "SampleEvaluation",
    "SampleGrid",
    "StopOnDivergence",
    "StopOnSigterm",
]
