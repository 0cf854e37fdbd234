"""The progress bar, which does not wait for the device at every step."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's bar, whose figures are read off the device as often as they are logged.

    To show a loss is to wait until the device has computed it. Lightning's own bar does so at every
    step, and the queue of the device runs empty meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read_at = -1
        self._figures: dict[str, Any] = {}

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The figures as they stood when they were last logged."""
        interval = max(1, int(trainer.log_every_n_steps))  # type: ignore[attr-defined]
        number = trainer.global_step // interval
        if number != self._read_at:
            self._read_at = number
            self._figures = super().get_metrics(trainer, pl_module)
            # The logger's version is the stage's name here, cut to four letters: it tells nothing.
            self._figures.pop("v_num", None)
        return self._figures
