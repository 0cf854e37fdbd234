"""Lightning callbacks: evaluation, image grids, weight averaging, and safeguards of a run."""

from invdiff_pl.callbacks.calibration import ScaleCalibration
from invdiff_pl.callbacks.dashboard import Dashboard
from invdiff_pl.callbacks.denoiser_form import DenoiserForm
from invdiff_pl.callbacks.ema import ExponentialMovingAverage
from invdiff_pl.callbacks.environments import SaveEnvironments
from invdiff_pl.callbacks.evaluation import SampleEvaluation
from invdiff_pl.callbacks.fit_evaluation import FitEvaluation
from invdiff_pl.callbacks.grids import SampleGrid
from invdiff_pl.callbacks.group_accuracy import GroupAccuracy
from invdiff_pl.callbacks.heldout import HeldOutSelection
from invdiff_pl.callbacks.max_micro_batch import MaxMicroBatch
from invdiff_pl.callbacks.progress import ProgressBar, ProgressLines
from invdiff_pl.callbacks.resource_estimate import ResourceEstimate
from invdiff_pl.callbacks.safety import StopOnDivergence, StopOnSigterm
from invdiff_pl.callbacks.samples import SaveSamples
from invdiff_pl.callbacks.save import LatentScale, SaveAdapter, SaveClassifier, SavePipeline

__all__ = [
    "Dashboard",
    "DenoiserForm",
    "ExponentialMovingAverage",
    "FitEvaluation",
    "GroupAccuracy",
    "HeldOutSelection",
    "LatentScale",
    "MaxMicroBatch",
    "ProgressBar",
    "ProgressLines",
    "ResourceEstimate",
    "SampleEvaluation",
    "SampleGrid",
    "SaveAdapter",
    "SaveClassifier",
    "SaveEnvironments",
    "SavePipeline",
    "SaveSamples",
    "ScaleCalibration",
    "StopOnDivergence",
    "StopOnSigterm",
]
