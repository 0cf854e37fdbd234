"""Several adapters trained at once beside one frozen backbone, which is asked once for all."""

from contextvars import Context
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from invdiff_pl.adapters.base import adapter_class
from invdiff_pl.adapters.branch import SharedDenoiser, WholeBranchAdapter
from invdiff_pl.backbones.noising import predict, sample_losses
from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.modules.common import (
    check_finite,
    data_module,
    hold_frozen,
    optimizer_with_schedule,
    require_step_limit,
    trained_state,
)
from invdiff_pl.modules.invariant_adapter import DEFAULT_ADAPTER, InvariantAdapter
from invdiff_pl.objectives import group_sums
from invdiff_pl.utils.errors import InvDiffError

# In what variants may differ: whatever leaves batches, draws and schedule the same for all.
VARYING = (
    "output",
    "adapter",
    "adapter_settings",
    "objective",
    "objective_settings",
    "lambda_",
    "loss_weighting",
    "min_snr_gamma",
    "learning_rate",
    "weight_decay",
)
NOT_SHARED = (
    "changes the frozen network's own pass, so there is no pass that several of it could share: "
    "choose --model.adapter=small_unet or unet_copy, or train one run for each variant and put "
    "them side by side with `make compare`"
)


class AdapterVariants(pl.LightningModule):
    """Trains K adapters in one go, each exactly as :class:`InvariantAdapter` trains it alone.

    Batches, timesteps, noises and dropped prompts are the same for all of them, and the frozen
    denoiser predicts once for all. Their parameters have nothing in common, so the sum of their
    objectives under one AdamW gives each the steps that it has alone: in float32 the weights are
    equal bit for bit. Activations of all K branches are held at once.

    Args:
        output: folder of the stage.
        variants: by name, the settings of an :class:`InvariantAdapter`; each writes to its own
            ``output``.

    Raises:
        InvDiffError: if an adapter changes the frozen denoiser's pass (``lora``, ``bottleneck``),
            or variants differ in more than adapter, objective, rate and decay.
    """

    def __init__(self, output: str, variants: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        require_shareable(variants)
        self.strict_loading = False
        self.output = output
        self.names = list(variants)
        self.variants = nn.ModuleList()
        for settings in variants.values():
            # One at a time, so that no more than two backbones are in memory. In a context of its
            # own: in the command line's, it would take this module's settings for its own.
            variant = Context().run(partial(InvariantAdapter, **settings))
            if len(self.variants) > 0:
                _share_backbone(variant, self.first)
            self.variants.append(variant)
        self.denoiser = SharedDenoiser([variant.adapter.denoiser for variant in self.variants])  # type: ignore[union-attr,misc]
        self._sums: tuple[int, Tensor | None] = (-1, None)

    @property
    def first(self) -> InvariantAdapter:
        """The variant that stands for what all have in common."""
        return self.members()[0]

    @property
    def pipeline(self) -> Any:
        """The pipeline whose networks all share."""
        return self.first.pipeline

    @property
    def embeddings(self) -> Tensor:
        """Of the prompts, the empty one last."""
        return self.first.embeddings

    def members(self) -> list[InvariantAdapter]:
        """The variants in order."""
        return list(self.variants)  # type: ignore[arg-type]

    def setup(self, stage: str) -> None:
        """Set up each variant.

        Raises:
            InvDiffError: if gradients are clipped by their common norm.
        """
        trainer = self.trainer
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
            raise InvDiffError(
                "--trainer.gradient_clip_val: variants that are trained together would be clipped "
                "by the norm of all their gradients: leave it out, or use "
                "--trainer.gradient_clip_algorithm=value."
            )
        for variant in self.members():
            variant.trainer = trainer
            variant.setup(stage)
        hold_frozen(self)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, of all variants."""
        return {
            f"{name}.{own}": parameter
            for name, variant in zip(self.names, self.variants, strict=True)
            for own, parameter in variant.trainable_parameters().items()  # type: ignore[operator]
        }

    def on_train_start(self) -> None:
        """Stop at once where there is no bias to mitigate."""
        self.first.on_train_start()

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """The sum of the variants' objectives on one (micro-)batch."""
        micro_batches = self.trainer.accumulate_grad_batches
        sums = self._whole_batch_sums() if micro_batches > 1 else [None] * len(self.names)
        total = self.embeddings.new_zeros(())
        risks: dict[str, Tensor] = {}
        for name, variant, losses, own in zip(
            self.names, self.members(), self._losses(batch), sums, strict=True
        ):
            objective = variant.objective(losses, batch["membership"], own)
            risks |= {f"{n} of {name}": risk for n, risk in enumerate(objective.risks)}
            total = total + objective.loss
        check_finite(total, self, risks)
        self.log("train/loss", total, prog_bar=True)
        return micro_batches * total  # Lightning divides by their number

    def _losses(self, batch: LatentBatch) -> list[Tensor]:
        """Per-sample losses ``[B]`` of each variant."""
        draw = self.first.draw(batch)
        predictions = predict(self.denoiser, draw.noisy, draw.timesteps, draw.embeddings)
        return [
            sample_losses(prediction, draw.target) * variant.loss_weights(draw.timesteps)
            for prediction, variant in zip(predictions, self.members(), strict=True)
        ]

    @torch.no_grad()
    def _whole_batch_sums(self) -> Tensor:
        """:func:`group_sums` of each variant over all micro-batches of this step, ``[K, 2, G]``."""
        step, sums = self._sums
        if step == self.global_step and sums is not None:
            return sums
        groups = data_module(self).inferred().groups
        total = self.embeddings.new_zeros((len(self.names), 2, groups))
        for batch in data_module(self).micro_batches(self.global_step):
            here: LatentBatch = self.trainer.strategy.batch_to_device(batch)
            losses = self._losses(here)
            total = total + torch.stack([group_sums(one, here["membership"]) for one in losses])
        total = self.first.add_up(total)
        self._sums = self.global_step, total
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let each objective take in the whole batch's risks, once a step."""
        for variant in self.members():
            variant.on_before_optimizer_step(optimizer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine, with a group of parameters for each variant."""
        require_step_limit(self)
        chosen: Any = self.first.hparams
        groups = [
            {
                "params": list(variant.trainable_parameters().values()),
                "lr": variant.hparams["learning_rate"],
                "weight_decay": variant.hparams["weight_decay"],
            }
            for variant in self.members()
        ]
        return optimizer_with_schedule(
            self, groups, chosen.learning_rate, chosen.weight_decay, chosen.warmup_steps
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen backbone out of checkpoints."""
        checkpoint["state_dict"] = trained_state(self, checkpoint["state_dict"])

    def on_fit_end(self) -> None:
        """Write every variant's adapter to its own folder."""
        for variant in self.members():
            variant.on_fit_end()


def _share_backbone(variant: InvariantAdapter, first: InvariantAdapter) -> None:
    """Give up a variant's own frozen networks for the first one's."""
    assert isinstance(variant.adapter, WholeBranchAdapter)
    variant.adapter.share(first.adapter.unet)
    for part in ("vae", "text_encoder"):
        setattr(variant.pipeline, part, getattr(first.pipeline, part))


def require_shareable(variants: dict[str, dict[str, Any]]) -> None:
    """Refuse variants that cannot be trained on the same draws and frozen predictions.

    Args:
        variants: settings of :class:`InvariantAdapter` by name.

    Raises:
        InvDiffError: naming variant and setting.
    """
    if not variants:
        raise InvDiffError("--model.variants: expected the settings of at least one variant.")
    first, *_ = variants.items()
    for name, settings in variants.items():
        kind = settings.get("adapter", DEFAULT_ADAPTER)
        if not issubclass(adapter_class(kind), WholeBranchAdapter):
            raise InvDiffError(f"variant {name}: {kind} {NOT_SHARED}.")
        for key in sorted((first[1].keys() | settings.keys()) - set(VARYING)):
            if first[1].get(key) != settings.get(key):
                raise InvDiffError(
                    f"variants {first[0]} and {name} differ in --model.{key}, which those that are "
                    f"trained together share; they may differ in {', '.join(VARYING[1:])}."
                )
