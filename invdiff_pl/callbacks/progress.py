"""Progress of a stage: a bar that does not wait for the device at every step, or lines."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.utilities import rank_zero_only

from invdiff_pl.modules.common import stage_name
from invdiff_pl.utils.progress import Loop, shows_bars, start


class ProgressBar(RichProgressBar):
    """Lightning's progress bar, with figures read from the device only as often as they are logged.

    Showing a loss means waiting until the device has computed it. Lightning's own bar does so at
    every step, and the device's queue runs empty meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read_at = -1
        self._figures: dict[str, Any] = {}

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the figures as of when they were last logged."""
        interval = max(1, int(trainer.log_every_n_steps))  # type: ignore[attr-defined]
        number = trainer.global_step // interval
        if number != self._read_at:
            self._read_at = number
            self._figures = super().get_metrics(trainer, pl_module)
            # The logger's version is the stage's name here, cut to four letters: it says nothing.
            self._figures.pop("v_num", None)
        return self._figures

    def _get_train_description(self, current_epoch: int) -> str:
        """Return Lightning's description, but for its "/-2" if training is counted in steps."""
        epochs = self.trainer.max_epochs
        if epochs is not None and epochs > 0:
            return super()._get_train_description(current_epoch)
        return f"{'Training':{len(self.validation_description)}}"


class ProgressLines(pl.Callback):
    """Prints a line now and then if the output is not a terminal.

    See :mod:`invdiff_pl.utils.progress`.
    """

    def __init__(self) -> None:
        self._loop: Loop | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting optimizer steps."""
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._start(pl_module, total, "step", trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        """Report the steps done."""
        self._reach(trainer.global_step)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting batches."""
        self._start(pl_module, int(sum(trainer.num_predict_batches)), "batch")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting batches."""
        self._start(pl_module, int(sum(trainer.num_test_batches)), "batch")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *unused: Any,
    ) -> None:
        """Report the batches done."""
        self._reach(batch_idx + 1)

    on_test_batch_end = on_predict_batch_end  # type: ignore[assignment]

    @rank_zero_only
    def _start(
        self, module: pl.LightningModule, total: int | None, unit: str, done: int = 0
    ) -> None:
        self._loop = start(stage_name(module), total, unit, done)

    def _reach(self, done: int) -> None:
        if self._loop is not None:
            self._loop.reach(done)


def progress_callback() -> pl.Callback:
    """Return the bar if the output is a terminal, else the lines."""
    return ProgressBar() if shows_bars() else ProgressLines()
