"""What the LightningModules share."""

from pathlib import Path
from typing import cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.errors import InvDiffError


def data_module(module: pl.LightningModule) -> BiasedDataModule:
    """The DataModule that the module's trainer runs on."""
    return cast(BiasedDataModule, module.trainer.datamodule)  # type: ignore[attr-defined]


def warmup_cosine(optimizer: AdamW, warmup_steps: int, total_steps: int) -> LRSchedulerConfigType:
    """Linear warm-up, then a cosine to zero, stepped every optimizer step."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + float(torch.cos(torch.tensor(min(1.0, progress) * torch.pi))))

    return LRSchedulerConfigType(scheduler=LambdaLR(optimizer, factor), interval="step")


def optimizer_with_schedule(
    module: pl.LightningModule,
    parameters: list[torch.nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
) -> OptimizerLRScheduler:
    """AdamW under :func:`warmup_cosine` over ``trainer.max_steps``."""
    optimizer = AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = warmup_cosine(optimizer, warmup_steps, module.trainer.max_steps)
    return {"optimizer": optimizer, "lr_scheduler": schedule}


def check_finite(loss: Tensor, module: pl.LightningModule) -> None:
    """Stop on a loss that is not finite, before it spoils the weights.

    Raises:
        InvDiffError: naming the step.
    """
    if not torch.isfinite(loss):
        raise InvDiffError(
            f"{type(module).__name__}: the loss is {loss.item()} at step {module.global_step}; the "
            "last checkpoint is unharmed; lower --model.learning_rate or use --trainer.precision=32"
            " and rerun."
        )


def require_step_limit(module: pl.LightningModule) -> None:
    """Training is counted in steps here; an unlimited trainer would never end.

    Raises:
        InvDiffError: if ``trainer.max_steps`` is not positive.
    """
    if module.trainer.max_steps <= 0:
        raise InvDiffError("--trainer.max_steps must be a positive number of optimizer steps.")


def output_folder(path: str) -> Path:
    """A stage's output folder, created."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
