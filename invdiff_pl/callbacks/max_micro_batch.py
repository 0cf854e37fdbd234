"""A global batch on any number of devices, in as many micro-batches as it takes."""

from math import ceil
from typing import Any

import pytorch_lightning as pl

from invdiff_pl.data.training import training_data
from invdiff_pl.utils.errors import InvDiffError


class MaxMicroBatch(pl.Callback):
    """Sets ``accumulate_grad_batches`` so that no device holds more than ``size`` samples at once.

    The global batch does not change, nor does the result, up to rounding: with more devices there
    are fewer micro-batches. A run that was interrupted on other devices resumes from the step that
    it had reached.

    Args:
        size: maximum number of samples per device and pass; ``None`` leaves the trainer's setting
            alone.
    """

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise InvDiffError(f"size={size}: expected at least 1, or none for no limit.", "size")
        self.size = size

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the number of micro-batches."""
        if self.size is not None:
            batch = training_data(trainer).batch_size
            trainer.accumulate_grad_batches = micro_batches(batch, trainer.world_size, self.size)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert a checkpoint's progress to the current number of micro-batches."""
        if self.size is not None:
            seen = trainer.global_step * trainer.accumulate_grad_batches
            loop = trainer.fit_loop.epoch_loop
            current: Any = loop.batch_progress.current
            current.ready = current.started = current.processed = seen
            # A checkpoint is written within a batch, which Lightning counts when it resumes.
            current.completed = seen - 1 if loop.restarted_on_train_batch_end else seen


def micro_batches(batch: int, devices: int, most: int) -> int:
    """Return the number of micro-batches per device of a global batch, at least 1."""
    return max(1, ceil(batch / (devices * most)))
