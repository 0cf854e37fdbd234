"""What keeps a run from spoiling its own work: on in every stage, whatever its YAML file says."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn
from torch.optim import Optimizer

from invdiff_pl.modules.common import diverged
from invdiff_pl.processes import defer_sigterm


class StopOnDivergence(pl.Callback):
    """Stops before an optimizer step whose gradients are not finite.

    A finite loss can have such gradients; the step would spoil every weight, and the next
    checkpoint would keep them. Under float16 the gradient scaler skips such steps itself.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the norm of all gradients."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            named = _not_finite(pl_module)
            raise diverged(pl_module, f"the gradients' norm is {float(norm)} ({named})")


class StopOnSigterm(pl.Callback):
    """Ends training on SIGTERM after the present batch, with a checkpoint.

    Several ranks are left to Lightning: they do not all see the signal at the same step. Lightning
    does not look for the signal while it predicts.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the signal wait for the end of a batch."""
        defer_sigterm(trainer.world_size == 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No longer."""
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
            # Said beforehand, so that a resumed run goes on writing to this file, not beside it.
            callback.last_model_path = str(Path(callback.dirpath) / "last.ckpt")
            trainer.save_checkpoint(callback.last_model_path)
        raise SIGTERMException

    def on_predict_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        """Stop; what has been written so far is kept."""
        if trainer.received_sigterm:
            raise SIGTERMException


def _not_finite(module: nn.Module) -> str:
    """The first parameter whose gradient is not finite, and how many others."""
    names = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    if not names:
        return "the sum of squares overflows"
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return f"of {names[0]}{others}"
