"""Safeguards of a run's own work: on in every stage, whatever its YAML file says."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.optim import Optimizer

from invdiff_pl.modules.common import diverged
from invdiff_pl.utils.processes import defer_sigterm


class StopOnDivergence(pl.Callback):
    """Stops before an optimizer step whose gradients are not finite.

    A finite loss can have such gradients; the step would spoil every weight, and the next
    checkpoint would keep them. Under float16 the gradient scaler skips such steps itself.

    Reading the norm means waiting for the device. On a GPU, a flag on the device therefore makes
    the fused optimizer leave the weights alone from such a step on, and the host checks as often as
    figures are logged, before a checkpoint is written and when training ends.

    Args:
        deferred: whether the host checks later; on GPUs only if not given.
    """

    def __init__(self, deferred: bool | None = None) -> None:
        self.deferred = deferred
        # The first step whose gradients were not finite, on the device; -1 if there is none.
        self._stopped_at: Tensor | None = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the norm of all gradients."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients)
        deferred = norm.is_cuda if self.deferred is None else self.deferred
        if deferred and optimizer.defaults.get("fused"):
            self._hold(norm, optimizer, trainer.global_step)
            if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
                self._look(pl_module)
        elif not torch.isfinite(norm):
            named = _not_finite(pl_module)
            raise diverged(pl_module, f"the gradients' norm is {float(norm)} ({named})")

    def _hold(self, norm: Tensor, optimizer: Optimizer, step: int) -> None:
        """Make the optimizer skip this and all later steps, if the norm is not finite."""
        if self._stopped_at is None:
            self._stopped_at = torch.full((), -1, dtype=torch.int64, device=norm.device)
        first = (self._stopped_at < 0) & ~torch.isfinite(norm)
        self._stopped_at = torch.where(first, step, self._stopped_at)
        # A gradient scaler would set this; fused optimizers read it.
        optimizer.found_inf = (self._stopped_at >= 0).float()  # type: ignore[attr-defined]

    def _look(self, module: pl.LightningModule) -> None:
        stopped_at = -1 if self._stopped_at is None else int(self._stopped_at)
        if stopped_at >= 0:
            raise diverged(module, "the gradients' norm is not finite", step=stopped_at)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check before anything is written."""
        self._look(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the result is written."""
        self._look(pl_module)


class StopOnSigterm(pl.Callback):
    """Ends training on SIGTERM after the current batch, with a checkpoint.

    Several ranks are left to Lightning, as they do not all see the signal at the same step.
    Prediction is stopped here, too, as Lightning does not check for the signal while it predicts.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Defer the signal to the end of a batch."""
        defer_sigterm(trainer.world_size == 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop deferring the signal."""
        defer_sigterm(False)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save and stop, if an optimizer step has just been made."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not (trainer.received_sigterm and trainer.world_size == 1 and stepped):
            return
        callback = trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            # Set beforehand, so that a resumed run goes on writing to this file, not beside it.
            callback.last_model_path = str(Path(callback.dirpath) / "last.ckpt")
            trainer.save_checkpoint(callback.last_model_path)
        raise SIGTERMException

    def on_predict_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        """Stop; what has been written so far is kept."""
        if trainer.received_sigterm:
            raise SIGTERMException


def _not_finite(module: nn.Module) -> str:
    """Name the first parameter whose gradient is not finite, and count the others."""
    names = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    if not names:
        return "the sum of squares overflows"
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return f"of {names[0]}{others}"
