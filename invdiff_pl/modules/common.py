"""What the LightningModules share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import DiffusionPipeline
from pytorch_lightning.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import frozen, load_pipeline
from invdiff_pl.backbones.prompts import Conditions, EncodesPrompts, KnownPrompts, TextEncoders
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.names import OPTIMIZERS, require_name


class OnPipeline(pl.LightningModule):
    """A module on a pipeline, which learns the prompts of its batches as it meets them.

    Attributes:
        pipeline: that it is on; one that was handed in stays as precise as it is.
        frozen: the pipeline's denoiser.
        conditions: what the prompts that batches number and, last, the empty one become.
    """

    conditions: Conditions

    def attach(
        self,
        backbone: str | DiffusionPipeline,
        prompts: Sequence[str] = (),
        resolution: int | None = None,
        frozen_weights: str = "float32",
    ) -> None:
        """Take a pipeline, or load it: call it in the constructor.

        Text encoders of one that is loaded follow when prompts are met that no DataModule tells.

        Args:
            backbone: a loaded pipeline, or a pipeline folder, hub id or ``asset:NAME``.
            prompts: that numbers in batches stand for, where no DataModule tells them.
            resolution: side of the images in pixels; the pipeline's own if not given.
            frozen_weights: how those of a pipeline that is loaded are held, see
                :func:`~invdiff_pl.backbones.pipeline.load_pipeline`.
        """
        self.owns_backbone = isinstance(backbone, str)
        encoders: EncodesPrompts
        if isinstance(backbone, str):
            self.pipeline = load_pipeline(backbone, frozen_weights, with_text_encoders=False)
            self.frozen = frozen_denoiser(self.pipeline, resolution)
            encoders = TextEncoders(backbone, self.frozen.resolution, frozen_weights)
        else:
            self.pipeline = frozen(backbone)
            encoders = self.frozen = frozen_denoiser(self.pipeline, resolution)
        self.known = KnownPrompts(encoders, prompts)

    def use_prompts(self, conditions: Conditions) -> None:
        """Take what the prompts that batches number and, last, the empty one become."""
        self.conditions = conditions

    def setup(self, stage: str) -> None:
        """Embed the prompts that no DataModule has told."""
        if not hasattr(self, "conditions"):
            self.use_prompts(self.known.conditions())

    def prompt_numbers(self, prompts: Tensor | Sequence[str]) -> Tensor:
        """The numbers of a batch's prompts, int64 ``[B]``; texts that are new are encoded."""
        if isinstance(prompts, Tensor):
            return prompts
        numbers = self.known.numbers(prompts).to(self.device)
        if len(self.conditions) != len(self.known) + 1:
            self.use_prompts(self.known.conditions().to(self.device))
        return numbers

    def latents_of(self, batch: Mapping[str, Any], noise: Tensor | None = None) -> Tensor:
        """A batch's latents, float32 ``[B, C, h, w]`` of unit variance.

        Args:
            batch: holds ``latents``, or the VAE posterior's ``moments``.
            noise: that the posterior is drawn with, ``[B, C, h, w]``; its mean if not given.
        """
        if "latents" in batch:
            return batch["latents"].float()
        return self.frozen.latents(batch["moments"], noise)


def stage_name(module: pl.LightningModule) -> str:
    """The stage that a module is trained or run in, as messages name it."""
    return getattr(module, "stage", type(module).__name__)


def hold_frozen(module: pl.LightningModule, *others: nn.Module) -> None:
    """Make what is not trained cheap to hold: call it in ``setup``.

    Under mixed precision (``bf16-mixed``, ``16-mixed``) frozen weights are rounded to half
    precision once, instead of at every pass; trained ones stay float32. DDP is told of the trained
    parameters only: the others are the same on all ranks as they come from the same files, and are
    not sent from one to another.

    Args:
        module: whose frozen parameters are meant.
        others: networks that it holds without having registered them, all of them frozen.
    """
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(module.trainer.precision)
    frozen = {name: value for name, value in module.named_parameters() if not value.requires_grad}
    if half is not None:
        for value in (*frozen.values(), *(p for other in others for p in other.parameters())):
            if value.is_floating_point():  # quantised ones stay
                value.data = value.data.to(half)
    ignored = [*frozen, *(name for name, _ in module.named_buffers())]
    # Where DistributedDataParallel looks for it.
    module._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def trained_state(module: pl.LightningModule, state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state dict checkpoints keep: trained weights and what objectives remember."""
    trained = {id(value) for value in module.trainable_parameters().values()}  # type: ignore[operator]
    names = {name for name, value in module.named_parameters() if id(value) in trained}
    return {
        name: value for name, value in state.items() if name in names or "rule" in name.split(".")
    }


def denoiser_of(module: pl.LightningModule) -> nn.Module:
    """The denoiser that a stage calls: the adapted one, where there is an adapter."""
    found: nn.Module = module.denoiser  # type: ignore[assignment]
    return found


def warmup_cosine(
    optimizer: Optimizer, warmup_steps: int, total_steps: int
) -> LRSchedulerConfigType:
    """Linear warm-up, then a cosine to zero, stepped every optimizer step."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + float(torch.cos(torch.tensor(min(1.0, progress) * torch.pi))))

    return LRSchedulerConfigType(scheduler=LambdaLR(optimizer, factor), interval="step")


def optimizer_with_schedule(
    module: pl.LightningModule,
    parameters: list[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    optimizer: str = "adamw",
) -> OptimizerLRScheduler:
    """AdamW under :func:`warmup_cosine` over ``trainer.max_steps``.

    Args:
        module: whose trainer tells the number of steps.
        parameters: that are trained.
        learning_rate: peak rate.
        weight_decay: of AdamW.
        warmup_steps: of the rate.
        optimizer: ``adamw``, or ``adamw8bit``, whose moments take a byte each (Dettmers et al.,
            arXiv 2110.02861).
    """
    require_name("optimizer", optimizer, OPTIMIZERS)
    made: Optimizer
    if optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # noqa: PLC0415 - installed by those who want it

        made = AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    else:
        made = AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = warmup_cosine(made, warmup_steps, module.trainer.max_steps)
    return {"optimizer": made, "lr_scheduler": schedule}


def share_of_mean(values: Tensor, count: int, module: pl.LightningModule) -> Tensor:
    """This part's share of a mean over the global batch.

    Ranks and micro-batches may hold one sample more or less than each other, and a mean of means
    would weigh their samples differently. Averaged over ranks and micro-batches, as Lightning does
    with gradients, the shares give the mean of the whole.

    Args:
        values: one a sample of this part of the batch, ``[B]``.
        count: samples of the global batch.
        module: whose trainer tells into how many parts the batch is cut.
    """
    trainer = module.trainer
    parts = trainer.world_size * trainer.accumulate_grad_batches
    return parts * values.sum() / count


def check_finite(
    loss: Tensor, module: pl.LightningModule, risks: Mapping[str, Tensor] | None = None
) -> None:
    """Stop on a loss that is not finite, before it spoils the weights.

    On a GPU it is looked at as often as figures are logged.

    Args:
        loss: of a batch.
        module: that is trained.
        risks: loss of each environment, by name.

    Raises:
        InvDiffError: naming stage, step, environment and the last good checkpoint.
    """
    trainer = module.trainer
    if loss.is_cuda and trainer.global_step % max(1, trainer.log_every_n_steps):  # type: ignore[attr-defined]
        return  # to look is to wait for the device; StopOnDivergence keeps the weights meanwhile
    if not torch.isfinite(loss):
        raise diverged(module, f"the loss is {loss.item()}", risks)


def diverged(
    module: pl.LightningModule,
    what: str,
    risks: Mapping[str, Tensor] | None = None,
    step: int | None = None,
) -> InvDiffError:
    """The error that tells where training went off, and what there is from before.

    Args:
        module: that is trained; its ``stage`` names the stage.
        what: is not finite.
        risks: loss of each environment, by name; those that are not finite are named.
        step: the optimizer step; the present one if not given.
    """
    trainer = module.trainer
    stage = stage_name(module)
    wrong = [n for n, risk in (risks or {}).items() if not bool(torch.isfinite(risk).all())]
    environments = f" (environment {', '.join(wrong)})" if wrong else ""
    return InvDiffError(
        f"stage {stage}, step {trainer.global_step if step is None else step}: {what}"
        f"{environments}; nothing of this step "
        f"was kept, and {_last_checkpoint(trainer)}; lower `learning_rate`, or use "
        "trainer.precision=32-true, and run again.",
        "learning_rate",
        "trainer.precision",
    )


def _last_checkpoint(trainer: pl.Trainer) -> str:
    callback = trainer.checkpoint_callback
    path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    path = path or trainer.ckpt_path or ""
    if path and Path(path).is_file():
        return f"the last good checkpoint is {path}"
    return "there is no checkpoint yet"


def require_step_limit(module: pl.LightningModule) -> None:
    """Training is counted in steps here; an unlimited trainer would never end.

    Raises:
        InvDiffError: if ``trainer.max_steps`` is not positive.
    """
    if module.trainer.max_steps <= 0:
        raise InvDiffError(
            f"trainer.max_steps={module.trainer.max_steps}: expected a positive number of "
            "optimizer steps.",
            "trainer.max_steps",
        )


def from_all_ranks(found: dict[Any, Any], trainer: pl.Trainer) -> dict[Any, Any]:
    """What the ranks have found, put together."""
    if trainer.world_size == 1:
        return found
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}
