"""What a stage will take: printed and checked before its first step, timed over its first ones."""

import time
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from invdiff_pl.backbones.noising import predict
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.modules import Backbone, ConditionalSampler, InvariantAdapter
from invdiff_pl.modules.common import data_module, denoiser_of
from invdiff_pl.utils.progress import in_time
from invdiff_pl.utils.resources import (
    ADAMW_COPIES,
    Plan,
    activations,
    free_memory,
    image_bytes,
    in_units,
    require_room,
    weights_of,
)

_TRAINED = (Backbone, InvariantAdapter)
# In which frozen weights are held, and whether trained ones are, too.
_HELD = {
    "bf16-mixed": (torch.bfloat16, False),
    "16-mixed": (torch.float16, False),
    "bf16-true": (torch.bfloat16, True),
    "16-true": (torch.float16, True),
}
_REMEDIES = {
    "environments": "lower --scale.scoring_batch",
    "samples": "lower --scale.sampling_batch",
    "backbone_samples": "lower --scale.sampling_batch",
}
_TRAINING = (
    "lower --scale.local_batch, set --scale.gradient_checkpointing=true, or choose a smaller "
    "adapter (of the backbone: --scale.backbone_lora_rank)"
)
# PNG hardly ever brings a picture below this part of its pixels.
_PNG_SHARE = 0.5


class StagePlan(pl.Callback):
    """Tells before the first step what memory and disk a stage takes, and refuses what cannot fit.

    Weights, gradients, optimizer and moving average are counted; activations are measured by a
    pass over one and one over two empty samples on the device itself (see
    :class:`~invdiff_pl.utils.resources.PeakMemory`), which needs less than one step of training.
    Weights are looked at before they go to the device. The time of the stage is told from its
    first steps.

    Args:
        warm_up: steps or batches that are not timed.
        timed: those that are.
    """

    def __init__(self, warm_up: int = 3, timed: int = 10) -> None:
        self.warm_up = warm_up
        self.timed = timed
        self.plan: Plan | None = None
        self.seconds_a_step: float | None = None
        self._started: tuple[int, float] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Count what is held all the time, and what is written."""
        device = trainer.strategy.root_device
        trained = _trained(pl_module)
        held, whole = _HELD.get(str(trainer.precision), (None, False))
        if isinstance(pl_module, ConditionalSampler) and not whole:
            held = None  # it folds updates into the weights as they are
        weights, frozen = weights_of(_networks(pl_module), trained, held)
        if held is not None and whole:
            weights = sum(value.numel() for value in trained) * held.itemsize
        self.plan = Plan(
            stage=Path(trainer.default_root_dir).name,
            device=str(device),
            weights_trained=weights,
            weights_frozen=frozen,
            # DistributedDataParallel has buckets of its own for them.
            gradients=weights * (2 if trainer.world_size > 1 else 1),
            optimizer=ADAMW_COPIES * weights,
            average=weights if trained else 0,
            batch=_local_batch(trainer, pl_module),
            available=_available(device, trainer, pl_module),
        )
        self._refuse()
        folder = Path(trainer.default_root_dir)
        # What an interrupted run has written is not written again.
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for size, what in _written(self.plan, data_module(pl_module), pl_module):
            require_room(folder, max(0, size - there), what)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure activations, tell the plan, refuse what cannot fit."""
        self._complete(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same."""
        self._complete(trainer, pl_module)

    on_test_start = on_predict_start

    def _complete(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self.plan is not None
        data = data_module(module)
        cache = 0
        if data.content == "latents":
            moments = data.moments()
            cached = moments.nbytes
            cache = cached if moments.held_on(module.device) else 0
        peak = activations(lambda count: _pass(trainer, module, count), self.plan.batch)
        # Of a pass that trains the gradients are part of the peak.
        peak -= min(peak, self.plan.weights_trained)
        self.plan = replace(self.plan, cache=cache, activations=peak)
        lines = self.plan.lines()
        if data.content == "latents":
            lines.append(f"  {'cache on disk':<28}{in_units(cached):>12}")
        for size, what in _written(self.plan, data, module):
            lines.append(f"  {'to be written':<28}{in_units(size):>12}: {what}")
        rank_zero_only(print)("\n".join(lines), flush=True)
        self._refuse()

    def _refuse(self) -> None:
        assert self.plan is not None
        self.plan.require_fit(_REMEDIES.get(self.plan.stage, _TRAINING))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        """Time optimizer steps."""
        self._time(trainer.global_step, trainer.max_steps, pl_module)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *unused: Any,
    ) -> None:
        """Time batches."""
        self._time(batch_idx + 1, int(sum(trainer.num_predict_batches)), pl_module)

    def _time(self, done: int, of: int, module: pl.LightningModule) -> None:
        if self.seconds_a_step is not None:
            return
        if self._started is None:
            self._started = (done + self.warm_up, 0.0)
        first, since = self._started
        if done < first or (since and done < min(first + self.timed, of)):
            return
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        now = time.monotonic()
        if not since:
            self._started = (done, now)
        elif done > first:
            self.seconds_a_step = (now - since) / (done - first)
            if done == of:
                return  # nothing is left to be told of
            rest = self.seconds_a_step * (of - done)
            rank_zero_only(print)(
                f"{self.seconds_a_step:.3g} s a step, measured over {done - first}: "
                f"{of - done} steps to go take about {in_time(rest)}, callbacks apart",
                flush=True,
            )


def _trained(module: pl.LightningModule) -> list[Tensor]:
    if not isinstance(module, _TRAINED):
        return []
    return list(module.trainable_parameters().values())


def _networks(module: pl.LightningModule) -> list[nn.Module]:
    """All that goes to the device, among it what callbacks draw with."""
    pipeline = getattr(module, "pipeline", None)
    others = [] if pipeline is None else [pipeline.vae, pipeline.text_encoder]
    return [module, *others]


def _local_batch(trainer: pl.Trainer, module: pl.LightningModule) -> int:
    data = data_module(module)
    if isinstance(module, _TRAINED):
        return ceil(data.batch_size / (trainer.world_size * trainer.accumulate_grad_batches))
    if data.content == "prompts":
        return min(data.batch_size, len(data.prompts) * data.samples_per_prompt)
    return min(data.batch_size, len(data.index.rows("train")))


def _available(device: torch.device, trainer: pl.Trainer, module: pl.LightningModule) -> int | None:
    """Memory for this process, before anything is put on the device."""
    free = free_memory(device)
    if free is None or device.type != "cpu":
        return free
    # The weights are there already, and the machine's processes share the rest.
    loaded = sum(weights_of(_networks(module)))
    return free // max(1, trainer.num_devices) + loaded


def _written(
    plan: Plan, data: BiasedDataModule, module: pl.LightningModule
) -> list[tuple[int, str]]:
    """Bytes of what the stage writes, and what it is."""
    if isinstance(module, ConditionalSampler):
        count = len(data.prompts) * data.samples_per_prompt * len(module.scales)
        side = _side(data, module) * module.pipeline.vae_scale_factor
        size = int(_PNG_SHARE * count * image_bytes((3, side, side)))
        return [(size, f"at least, {count} images of {side}×{side} pixels")]
    if plan.weights_trained:
        # A checkpoint is written beside the one that it replaces.
        size = 2 * (plan.weights_trained + plan.optimizer + plan.average)
        return [(size, "two checkpoints")]
    return []


def _side(data: BiasedDataModule, module: Any) -> int:
    """Side of the latents."""
    if data.content == "latents":
        return int(data.moments().shape[-1])
    return int(module.pipeline.unet.config.sample_size)


def _pass(trainer: pl.Trainer, module: Any, count: int) -> None:
    """A pass over so many empty samples: forward, and backward where there is one."""
    data, trained = data_module(module), _trained(module)
    unet: Any = denoiser_of(module)
    guided = isinstance(module, ConditionalSampler) and module.guidance_scale > 1
    rows = 2 * count if guided else count
    side, channels = _side(data, module), unet.config.in_channels
    noisy = torch.zeros((rows, channels, side, side), device=module.device)
    timesteps = torch.zeros(rows, dtype=torch.int64, device=module.device)
    embeddings = module.embeddings[-1:].expand(rows, -1, -1)
    plugin = trainer.precision_plugin
    context = plugin.train_step_context if trained else plugin.predict_step_context
    with context(), torch.set_grad_enabled(bool(trained)):
        prediction = predict(unet, noisy, timesteps, embeddings)
        if trained:
            # Unlike backward() it touches neither .grad nor what listens to it.
            loss = prediction.float().square().mean()
            torch.autograd.grad(loss, trained, allow_unused=True)
        elif isinstance(module, ConditionalSampler):
            module.vae.decode(noisy[:count].to(module.vae.dtype))
