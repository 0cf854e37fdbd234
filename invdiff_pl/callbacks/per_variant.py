"""Callbacks of one adapter, for each of several that are trained together."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger

from invdiff_pl.modules import AdapterVariants, InvariantAdapter


class PerVariant(pl.Callback):
    """Gives each variant of an :class:`~invdiff_pl.modules.AdapterVariants` callbacks of its own.

    They are written for an :class:`~invdiff_pl.modules.InvariantAdapter`, and see no other: the
    trainer that they are handed has the variant's callbacks and logger. Each variant's figures are
    logged under the names that they have in a run of its own.

    Args:
        callbacks: copied for each variant; called in order.
        logs: folder that holds each variant's folder of event files; none are written if not given
            or if the trainer does not log.
    """

    def __init__(self, callbacks: Sequence[pl.Callback], logs: str | None = None) -> None:
        self.callbacks = list(callbacks)
        self.logs = None if logs is None else Path(logs)
        self._views: dict[str, pl.Trainer] = {}
        self._logged_at = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the callbacks."""
        assert isinstance(pl_module, AdapterVariants)
        for name, variant in zip(pl_module.names, pl_module.members(), strict=True):
            logger = self._logger(trainer, name)
            view = cast(pl.Trainer, _View(trainer, copy.deepcopy(self.callbacks), logger))
            self._views[name] = view
            for callback in _callbacks(view):
                callback.setup(view, variant, stage)

    def _logger(self, trainer: pl.Trainer, name: str) -> Logger | None:
        if self.logs is None or not isinstance(trainer.logger, TensorBoardLogger):
            return None
        return TensorBoardLogger(
            self.logs / name, name="tensorboard", version="adapter", default_hp_metric=False
        )

    def _each(
        self, module: pl.LightningModule
    ) -> Iterator[tuple[pl.Callback, pl.Trainer, InvariantAdapter]]:
        assert isinstance(module, AdapterVariants)
        for name, variant in zip(module.names, module.members(), strict=True):
            for callback in _callbacks(self._views[name]):
                yield callback, self._views[name], variant

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand it on."""
        self._logged_at = trainer.global_step
        for callback, view, variant in self._each(pl_module):
            callback.on_train_start(view, variant)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Hand it on, and log each variant's figures as often as the trainer logs."""
        assert isinstance(pl_module, AdapterVariants)
        step = trainer.global_step
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step != self._logged_at and step % every == 0:
            self._logged_at = step
            for name, variant in zip(pl_module.names, pl_module.members(), strict=True):
                logger = self._views[name].logger
                if logger is not None:
                    figures = {tag: float(value) for tag, value in variant.figures().items()}
                    logger.log_metrics(figures, step - 1)  # steps count from 0 in logs
        for callback, view, variant in self._each(pl_module):
            callback.on_train_batch_end(view, variant, outputs, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand it on."""
        for callback, view, variant in self._each(pl_module):
            callback.on_train_end(view, variant)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand it on, before the module writes its results."""
        for callback, view, variant in self._each(pl_module):
            callback.on_fit_end(view, variant)
        for view in self._views.values():
            if view.logger is not None:
                view.logger.finalize("success")

    def state_dict(self) -> dict[str, Any]:
        """Of every callback of every variant, for checkpoints."""
        return {
            name: [callback.state_dict() for callback in _callbacks(view)]
            for name, view in self._views.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, states in state_dict.items():
            for callback, state in zip(_callbacks(self._views[name]), states, strict=True):
                callback.load_state_dict(state)


class _View:
    """A trainer as one variant's callbacks see it; all but their neighbours is the trainer's."""

    def __init__(
        self, trainer: pl.Trainer, callbacks: list[pl.Callback], logger: Logger | None
    ) -> None:
        self._trainer = trainer
        self.callbacks = callbacks
        self.logger = logger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _callbacks(view: pl.Trainer) -> list[pl.Callback]:
    return view.callbacks  # type: ignore[attr-defined]
