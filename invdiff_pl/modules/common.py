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
    """Base class of modules on a pipeline, which number the prompts of batches as they meet them.

    Attributes:
        pipeline: the pipeline; one that was handed in keeps its precision.
        frozen: the pipeline's denoiser.
        conditions: the denoiser's inputs for the prompts that batches number and, last, the empty
            one.
    """

    conditions: Conditions

    def attach(
        self,
        backbone: str | DiffusionPipeline,
        prompts: Sequence[str] = (),
        resolution: int | None = None,
        frozen_weights: str = "float32",
    ) -> None:
        """Take a loaded pipeline, or load one: to be called in the constructor.

        Its text encoders are loaded only when prompts are met that no DataModule has set.

        Args:
            backbone: a loaded pipeline, or a pipeline folder, hub id or ``asset:NAME``.
            prompts: prompts that numbers in batches stand for, if no DataModule sets them.
            resolution: side of the images in pixels; the pipeline's own if not given.
            frozen_weights: how the weights of a pipeline that is loaded are held, see
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
        """Set the denoiser's inputs for the prompts of batches and, last, the empty one."""
        self.conditions = conditions

    def setup(self, stage: str) -> None:
        """Embed the prompts, if no DataModule has set them."""
        if not hasattr(self, "conditions"):
            self.use_prompts(self.known.conditions())

    def prompt_numbers(self, prompts: Tensor | Sequence[str]) -> Tensor:
        """Return the numbers of a batch's prompts, int64 ``[B]``; new texts are encoded."""
        if isinstance(prompts, Tensor):
            return prompts
        numbers = self.known.numbers(prompts).to(self.device)
        if len(self.conditions) != len(self.known) + 1:
            self.use_prompts(self.known.conditions().to(self.device))
        return numbers

    def latents_of(self, batch: Mapping[str, Any], noise: Tensor | None = None) -> Tensor:
        """Return a batch's latents, float32 ``[B, C, h, w]`` of unit variance.

        Args:
            batch: batch that holds ``latents``, or the VAE posterior's ``moments``.
            noise: noise with which the posterior is drawn, ``[B, C, h, w]``; the posterior's mean
                is taken if not given.
        """
        if "latents" in batch:
            return batch["latents"].float()
        return self.frozen.latents(batch["moments"], noise)


def stage_name(module: pl.LightningModule) -> str:
    """Return the name, in messages, of the stage that a module is trained or run in."""
    return getattr(module, "stage", type(module).__name__)


def hold_frozen(module: pl.LightningModule, *others: nn.Module) -> None:
    """Make frozen weights cheap to hold: to be called in ``setup``.

    Under mixed precision (``bf16-mixed``, ``16-mixed``) frozen weights are rounded to half
    precision once, instead of at every pass; trained ones stay float32. DDP handles the trained
    parameters only: the others come from the same files on all ranks, and need not be sent from
    one rank to another.

    Args:
        module: module whose frozen parameters are meant.
        others: networks that the module holds without having registered them, all of them frozen.
    """
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(module.trainer.precision)
    frozen = {name: value for name, value in module.named_parameters() if not value.requires_grad}
    if half is not None:
        for value in (*frozen.values(), *(p for other in others for p in other.parameters())):
            if value.is_floating_point():  # quantised weights stay as they are
                value.data = value.data.to(half)
    ignored = [*frozen, *(name for name, _ in module.named_buffers())]
    # DistributedDataParallel looks for the names here.
    module._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def trained_state(module: pl.LightningModule, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what checkpoints keep of a state dict: trained weights, and the objective's state."""
    trained = {id(value) for value in module.trainable_parameters().values()}  # type: ignore[operator]
    names = {name for name, value in module.named_parameters() if id(value) in trained}
    return {
        name: value for name, value in state.items() if name in names or "rule" in name.split(".")
    }


def denoiser_of(module: pl.LightningModule) -> nn.Module:
    """Return the denoiser that a stage calls: the adapted one if there is an adapter."""
    found: nn.Module = module.denoiser  # type: ignore[assignment]
    return found


def warmup_cosine(
    optimizer: Optimizer, warmup_steps: int, total_steps: int
) -> LRSchedulerConfigType:
    """Schedule a linear warm-up, then a cosine decay to zero, stepped every optimizer step."""

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
    """Make AdamW with the schedule :func:`warmup_cosine` over ``trainer.max_steps``.

    Args:
        module: module whose trainer sets the number of steps.
        parameters: parameters that are trained.
        learning_rate: peak rate.
        weight_decay: weight decay of AdamW.
        warmup_steps: number of steps over which the rate is warmed up.
        optimizer: ``adamw``, or ``adamw8bit``, whose moments take one byte each (Dettmers et al.,
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
    """Return this part's share of a mean over the global batch.

    Ranks and micro-batches may differ by one sample, and a mean of means would weigh their samples
    differently. Averaged over ranks and micro-batches, as Lightning does with gradients, the shares
    give the mean of the whole.

    Args:
        values: one value per sample of this part of the batch, ``[B]``.
        count: number of samples of the global batch.
        module: module whose trainer sets the number of parts that the batch is cut into.
    """
    trainer = module.trainer
    parts = trainer.world_size * trainer.accumulate_grad_batches
    return parts * values.sum() / count


def check_finite(
    loss: Tensor, module: pl.LightningModule, risks: Mapping[str, Tensor] | None = None
) -> None:
    """Stop on a loss that is not finite, before it spoils the weights.

    On a GPU the loss is checked only as often as figures are logged.

    Args:
        loss: loss of a batch.
        module: module that is trained.
        risks: loss of each environment, by name.

    Raises:
        InvDiffError: naming the stage, the step, the environment and the last good checkpoint.
    """
    trainer = module.trainer
    if loss.is_cuda and trainer.global_step % max(1, trainer.log_every_n_steps):  # type: ignore[attr-defined]
        return  # reading it waits for the device; StopOnDivergence protects the weights meanwhile
    if not torch.isfinite(loss):
        raise diverged(module, f"the loss is {loss.item()}", risks)


def diverged(
    module: pl.LightningModule,
    what: str,
    risks: Mapping[str, Tensor] | None = None,
    step: int | None = None,
) -> InvDiffError:
    """Make the error that says where training diverged, and which checkpoint is left.

    Args:
        module: module that is trained; its ``stage`` names the stage.
        what: clause saying what is not finite.
        risks: loss of each environment, by name; those that are not finite are named.
        step: the optimizer step; the current one if not given.
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
    """Check that training has a number of steps; an unlimited trainer would never end.

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
    """Merge what the ranks have found."""
    if trainer.world_size == 1:
        return found
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}
