"""What a stage takes of memory, disk and time, told before it takes it."""

import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any
from weakref import finalize

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from invdiff_pl.backbones.noising import predict
from invdiff_pl.modules import ConditionalSampler
from invdiff_pl.modules.common import data_module, denoiser_of
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.progress import in_time
from invdiff_pl.utils.resources import free_memory, image_bytes, in_units, require_room

_REMEDIES = {
    True: "lower --scale.max_micro_batch, set --scale.gradient_checkpointing=true, or choose a "
    "smaller adapter (of the backbone: --scale.backbone_lora_rank)",
    False: "lower --scale.scoring_batch (environments) or --scale.sampling_batch (samples)",
}
# PNG hardly ever brings a picture below this part of its pixels.
_PNG_SHARE = 0.5
# Of the parts those that are there before the first step.
_LOADED = ("weights, trained", "weights, frozen", "cache held")


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that come to be while it is entered, and their peak.

    Whatever the device, what an operation allocates for itself and frees before it returns is not
    seen, nor what an allocator loses between blocks.

    Attributes:
        peak: largest number of bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take note of storages that are new."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if (key := storage._cdata) not in given and key not in self._alive:
                self._alive[key] = storage.nbytes()
                finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def activations(run: Callable[[int], object], batch: int) -> int:
    """Peak bytes of a pass over ``batch`` samples, from passes over one and over two.

    What grows with the batch grows in proportion to it.

    Args:
        run: makes a pass over so many samples: forward, and backward where there is one.
        batch: samples.
    """
    peaks = []
    for count in (1, 2):
        with PeakMemory() as memory:
            run(count)
        peaks.append(memory.peak)
    return peaks[0] + (batch - 1) * max(0, peaks[1] - peaks[0])


class ResourceEstimate(pl.Callback):
    """Tells before the first step what a stage takes, and refuses what cannot fit.

    Weights, gradients, AdamW's two moments and the moving average are counted; activations are
    measured on the device itself, in passes over one and over two empty samples. The time of the
    stage is told from its first steps.

    Args:
        warm_up: steps or batches that are not timed.
        timed: those that are.

    Attributes:
        parts: bytes by what holds them, once told.
        seconds_per_step: once measured.
    """

    def __init__(self, warm_up: int = 3, timed: int = 10) -> None:
        self.warm_up = warm_up
        self.timed = timed
        self.parts: dict[str, int] = {}
        self.seconds_per_step: float | None = None
        self._first: int | None = None
        self._since: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, tell, and refuse what cannot fit."""
        stage, device = Path(trainer.default_root_dir).name, pl_module.device
        self.parts = _parts(trainer, pl_module)
        free, total = free_memory(device), sum(self.parts.values())
        if free is not None:
            loaded = sum(self.parts[name] for name in _LOADED)
            # The machine's processes share its memory.
            free = free // (max(1, trainer.num_devices) if device.type == "cpu" else 1) + loaded
        told = {name: in_units(size) for name, size in self.parts.items() if size}
        told["in all, of what is free"] = f"{in_units(total)} of " + (
            "unknown" if free is None else in_units(free)
        )
        size, what = _written(pl_module, self.parts)
        if size:
            told["to be written"] = f"{in_units(size)}: {what}"
        lines = [f"  {name:<28}{text:>12}" for name, text in told.items()]
        rank_zero_only(print)("\n".join([f"stage {stage} on {device}:", *lines]), flush=True)
        if free is not None and total > free:
            peak = list(self.parts)[-1]
            raise InvDiffError(
                f"stage {stage} cannot fit on {device}: it needs about {in_units(total)} "
                f"({in_units(self.parts[peak])} of them {peak}), and {in_units(free)} are free: "
                f"{_REMEDIES[bool(_trained(pl_module))]}."
            )
        folder = Path(trainer.default_root_dir)
        # What an interrupted run has written is not written again.
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        require_room(folder, max(0, size - there), what)

    on_predict_start = on_test_start = on_train_start

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
        self._first = done if self._first is None else self._first
        begin = self._first + self.warm_up
        if done == begin and self._since is None:
            self._since = _now(module)
        elif self._since is not None and done == min(begin + self.timed, of) and done > begin:
            seconds = (_now(module) - self._since) / (done - begin)
            self.seconds_per_step, self._since = seconds, None
            if done < of:
                rank_zero_only(print)(
                    f"{seconds:.3g} s a step, measured over {done - begin}: {of - done} steps to "
                    f"go take about {in_time(seconds * (of - done))}, callbacks apart",
                    flush=True,
                )


def _now(module: pl.LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.monotonic()


def _trained(module: pl.LightningModule) -> list[Tensor]:
    return list(getattr(module, "trainable_parameters", dict)().values())


def _parts(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, int]:
    """Bytes by what holds them; the activations come last."""
    data, trained = data_module(module), _trained(module)
    pipeline: Any = getattr(module, "pipeline", None)
    networks = [module, *([pipeline.vae, pipeline.text_encoder] if pipeline else [])]
    held = {id(value): value.nbytes for part in networks for value in part.parameters()}
    weights, cache = sum(value.nbytes for value in trained), 0
    if data.content == "latents":
        batch, moments = min(data.batch_size, len(data.index.rows("train"))), data.moments()
        cache = moments.nbytes if moments.held_on(module.device) else 0
    else:
        batch = min(data.batch_size, len(data.prompts) * data.samples_per_prompt)
    if trained:
        batch = ceil(data.batch_size / (trainer.world_size * trainer.accumulate_grad_batches))
    peak = activations(lambda count: _pass(trainer, module, count), batch)
    return {
        "weights, trained": weights,
        "weights, frozen": sum(held.values()) - weights,
        "cache held": cache,
        # DistributedDataParallel has buckets of its own for them.
        "gradients": weights * (2 if trainer.world_size > 1 else 1),
        "optimizer": 2 * weights,
        "moving average": weights,
        # Of a pass that trains the gradients are part of the peak.
        f"activations of {batch} samples": max(0, peak - weights),
    }


def _written(module: Any, parts: dict[str, int]) -> tuple[int, str]:
    """Bytes of what the stage writes, and what it is."""
    data = data_module(module)
    if isinstance(module, ConditionalSampler):
        count = len(data.prompts) * data.samples_per_prompt * len(module.scales)
        side = _side(module) * module.pipeline.vae_scale_factor
        size = int(_PNG_SHARE * count * image_bytes((3, side, side)))
        return size, f"at least, {count} images of {side}×{side} pixels"
    # Weights, optimizer and average; one is written beside the one that it replaces.
    return 8 * parts["weights, trained"], "two checkpoints"


def _side(module: Any) -> int:
    """Side of the latents."""
    data = data_module(module)
    if data.content == "latents":
        return int(data.moments().shape[-1])
    return int(module.pipeline.unet.config.sample_size)


def _pass(trainer: pl.Trainer, module: Any, count: int) -> None:
    """A pass over so many empty samples: forward, and backward where there is one."""
    trained = _trained(module)
    unet: Any = denoiser_of(module)
    guided = isinstance(module, ConditionalSampler) and module.guidance_scale > 1
    rows, side = 2 * count if guided else count, _side(module)
    noisy = torch.zeros((rows, unet.config.in_channels, side, side), device=module.device)
    timesteps = torch.zeros(rows, dtype=torch.int64, device=module.device)
    embeddings = module.conditions.null["prompt_embeds"].expand(rows, -1, -1)
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
