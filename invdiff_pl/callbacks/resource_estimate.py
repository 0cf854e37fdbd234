"""Estimate of the memory and disk space that a stage takes, before it takes them."""

from collections.abc import Callable
from math import ceil, prod
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from invdiff_pl.callbacks.data import data_module
from invdiff_pl.data.samples import require_few_samples
from invdiff_pl.modules import ConditionalSampler, EnvironmentInference
from invdiff_pl.modules.common import denoiser_of
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.operations import count_operations
from invdiff_pl.utils.resources import free_memory, in_units, require_room

_REMEDIES = {
    True: "lower --scale.max_micro_batch, set --scale.gradient_checkpointing=true, or choose a "
    "smaller adapter (of the backbone: --scale.backbone_lora_rank)",
    False: "lower --scale.scoring_batch (environments) or --scale.sampling_batch (samples)",
}
# Parts that are in memory before the first step.
_LOADED = ("weights, trained", "weights, frozen", "cache held")
# PNG hardly ever compresses a picture below this share of its pixels' bytes.
_PNG_SHARE = 0.5


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are created while it is entered, and their peak.

    On any device, it does not see what an operation allocates for itself and frees before it
    returns, nor what an allocator loses between blocks.

    Attributes:
        peak: largest number of bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # A storage's Python object lives as long as the storage.
        self._alive: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record new storages."""
        given = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self._alive |= _storages(result) - given
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self._alive))
        return result


def _storages(values: Any) -> set[torch.UntypedStorage]:
    return {leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def activations(run: Callable[[int], object], batch: int) -> int:
    """Estimate the peak bytes of a pass over ``batch`` samples, from passes over one and over two.

    What grows with the batch is taken to grow in proportion to it.

    Args:
        run: makes a pass over a number of samples: forward and, in training, backward.
        batch: number of samples.
    """
    peaks = []
    for count in (1, 2):
        with PeakMemory() as memory:
            run(count)
        peaks.append(memory.peak)
    return peaks[0] + (batch - 1) * max(0, peaks[1] - peaks[0])


class ResourceEstimate(pl.Callback):
    """Reports before the first step what a stage takes, and refuses what cannot fit.

    Weights, gradients, AdamW's two moments and the moving average are counted; activations are
    measured on the device itself, in passes over one and over two empty samples.

    Args:
        max_samples: maximum number of samples to draw, over all prompts and scales; any number if
            not given.

    Attributes:
        parts: bytes by what holds them, once reported.
        operations: number of operations per device in the denoiser's matrix products, convolutions
            and attention, once reported.
    """

    def __init__(self, max_samples: int | None = None) -> None:
        self.max_samples = max_samples
        self.parts: dict[str, int] = {}
        self.operations = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, report, and refuse what cannot fit."""
        folder, device = Path(trainer.default_root_dir), pl_module.device
        if isinstance(pl_module, ConditionalSampler):
            data, side = data_module(trainer), pl_module.frozen.resolution
            sizes = len(data.prompts), data.samples_per_prompt, len(pl_module.scales)
            require_few_samples(*sizes, self.max_samples)
            # Files that exist already need no more room.
            there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            size = int(_PNG_SHARE * prod(sizes) * 3 * side**2) - there
            require_room(folder, max(0, size), f"{prod(sizes)} images of {side}×{side} pixels")
        trained = list(getattr(pl_module, "trainable_parameters", dict)().values())
        self.parts = _parts(trainer, pl_module, trained)
        free, total = free_memory(device), sum(self.parts.values())
        if free is not None:
            # Processes on a machine share its memory; what is loaded is no longer free.
            free //= max(1, trainer.num_devices) if device.type == "cpu" else 1
            free += sum(self.parts[name] for name in _LOADED)
        room = "unknown" if free is None else in_units(free)
        lines = [f"stage {folder.name} on {device}: {in_units(total)} of {room} are needed"]
        lines += [f"  {name:<28}{in_units(size):>12}" for name, size in self.parts.items() if size]
        self.operations = _operations(trainer, pl_module, trained)
        if self.operations:
            lines.append(f"  {'operations per device':<28}{self.operations / 1e12:>9,.1f} TFLOP")
        rank_zero_only(print)("\n".join(lines), flush=True)
        if free is not None and total > free:
            *_, (name, peak) = self.parts.items()
            raise InvDiffError(
                f"stage {folder.name} cannot fit on {device}: it needs about {in_units(total)} "
                f"({in_units(peak)} of them {name}), and {room} are free: "
                f"{_REMEDIES[bool(trained)]}."
            )

    on_predict_start = on_test_start = on_train_start


def _parts(trainer: pl.Trainer, module: Any, trained: list[Tensor]) -> dict[str, int]:
    """Return bytes by what holds them; the activations come last."""
    data, weights = data_module(trainer), sum(value.nbytes for value in trained)
    held = {
        id(value): value.nbytes
        for part in (module, *module.frozen.other_networks)
        for value in part.parameters()
    }
    batch, latents = data.batch_size, data.content == "latents"
    if trained:
        batch = ceil(batch / (trainer.world_size * trainer.accumulate_grad_batches))
    else:
        drawn = len(data.prompts) * data.samples_per_prompt
        batch = min(batch, len(data.index.rows("train")) if latents else drawn)
    peak = activations(lambda count: _pass(trainer, module, trained, count), batch)
    cached = latents and data.moments().held_on(module.device)
    return {
        "weights, trained": weights,
        "weights, frozen": sum(held.values()) - weights,
        "cache held": data.moments().nbytes if cached else 0,
        # DistributedDataParallel has its own buckets for them.
        "gradients": weights * (2 if trainer.world_size > 1 else 1),
        "optimizer": 2 * (weights // 4 if _in_eight_bits(module) else weights),
        "moving average": weights,
        # In a training pass the gradients are part of the peak.
        f"activations of {batch} samples": max(0, peak - weights),
    }


def _in_eight_bits(module: Any) -> bool:
    return bool(module.hparams.get("optimizer") == "adamw8bit")


def _operations(trainer: pl.Trainer, module: Any, trained: list[Tensor]) -> int:
    """Count the operations per device: those of a sample's passes, times its samples and steps.

    The extra pass of gradient accumulation, frozen predictions used as targets, and what callbacks
    draw and measure are left out. The count is 0 if the stage runs no denoiser.
    """
    data = data_module(trainer)

    def run() -> None:
        if isinstance(module, EnvironmentInference):
            latents = torch.zeros((1, *_latent_shape(data, module)), device=module.device)
            module.features_of({"latents": latents}, torch.zeros(1, dtype=torch.int64))
        else:
            _pass(trainer, module, trained, 1, decodes=False)

    if trained:
        samples = max(0, trainer.max_steps) * data.batch_size
    elif isinstance(module, ConditionalSampler):
        sizes = len(data.prompts), data.samples_per_prompt, len(module.scales), module.steps
        samples = prod(sizes)
    elif isinstance(module, EnvironmentInference):
        samples = len(data.index.rows("train"))
    else:
        return 0
    return int(count_operations(run) * samples / trainer.world_size)


def _latent_shape(data: Any, module: Any) -> tuple[int, ...]:
    """Return the shape ``[C, H, W]`` of the latents that a stage's network is given."""
    channels, *size = module.frozen.latent_shape
    if data.content == "latents":
        size = list(data.moments().shape[-2:])
    return channels, *size


def _pass(
    trainer: pl.Trainer, module: Any, trained: list[Tensor], count: int, decodes: bool = True
) -> None:
    """Make a pass over ``count`` empty samples: forward and, in training, backward."""
    data, frozen = data_module(trainer), module.frozen
    draws = isinstance(module, ConditionalSampler)
    rows = 2 * count if draws and module.guidance_scale > 1 else count
    noisy = torch.zeros((rows, *_latent_shape(data, module)), device=module.device)
    zeros = torch.zeros(rows, dtype=torch.int64, device=module.device)
    plugin = trainer.precision_plugin
    context = plugin.train_step_context if trained else plugin.predict_step_context
    with context(), torch.set_grad_enabled(bool(trained)):
        prompts = module.conditions[zeros - 1]  # the empty prompt is the last
        prediction = frozen.predict(noisy, zeros, prompts, denoiser_of(module))
        if trained:
            # Unlike backward(), it touches neither .grad nor hooks on it.
            torch.autograd.grad(prediction.float().square().mean(), trained, allow_unused=True)
        elif draws and decodes:
            module.vae.decode(noisy[:count].to(module.vae.dtype))
