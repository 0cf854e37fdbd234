"""Exponential moving average of the trained weights, which become the result."""

from typing import Any

import pytorch_lightning as pl
from diffusers.training_utils import EMAModel
from torch import nn


class ExponentialMovingAverage(pl.Callback):
    """Averages ``module.trainable_parameters()`` and puts the average in place at the end.

    Lightning's own averaging copies the whole module, including the frozen backbone, and cannot
    resume from checkpoints without frozen weights; this callback holds the trained parameters only.

    Args:
        decay: decay of the average, in (0, 1); early steps use a smaller one, by EMAModel's
            warm-up.
    """

    changes_result = True

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self._average: EMAModel | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the current weights, or from a checkpoint's average."""
        self._start(pl_module)
        self._step = trainer.global_step

    def _start(self, pl_module: pl.LightningModule) -> EMAModel:
        if self._average is None:
            self._average = EMAModel(_parameters(pl_module), decay=self.decay)
            if self._restored is not None:
                self._average.load_state_dict(self._restored)
            self._average.to(pl_module.device)
        return self._average

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        """Update the average after an optimizer step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._start(pl_module).step(_parameters(pl_module))

    def swap(self, pl_module: pl.LightningModule) -> None:
        """Put the average in place, keeping the current weights for :meth:`restore`."""
        if self._average is not None:
            self._average.store(_parameters(pl_module))
            self._average.copy_to(_parameters(pl_module))

    def restore(self, pl_module: pl.LightningModule) -> None:
        """Undo :meth:`swap`."""
        if self._average is not None:
            self._average.restore(_parameters(pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place, before the result is written.

        A run that was interrupted after its last step does not start training again, so the
        average may still have to be taken from the checkpoint.
        """
        self._start(pl_module).copy_to(_parameters(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return the average, for checkpoints."""
        return {} if self._average is None else self._average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's average until training starts."""
        self._restored = state_dict or None


def _parameters(pl_module: pl.LightningModule) -> list[nn.Parameter]:
    trained: dict[str, nn.Parameter] = pl_module.trainable_parameters()  # type: ignore[operator]
    return list(trained.values())
