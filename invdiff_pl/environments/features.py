"""What a frozen denoiser sees in images: one vector per image, in one streaming pass."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invdiff_pl.backbones.denoiser import Condition, FrozenDenoiser, repeated, without_padding
from invdiff_pl.backbones.draws import generator, on_device, stratified_timesteps
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.noising import sample_losses, timestep_at
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.tensors import first_not_finite

# Levels of noise, as logarithms of the signal-to-noise ratio: with less noise details are seen,
# with more the layout. In Stable Diffusion's schedule they are about 0.3 and 0.7 of all timesteps.
LEVELS = (0.26, -2.84)
# Sides of the grids over which a block's output is averaged: the whole and quarters.
_GRIDS = (1, 2)
# For losses: timesteps in the noisier part, where layout is decided, and noises at each of them.
TIMESTEPS, EARLIEST, LATEST = 4, 0.72, 0.96
NOISES = 8


class _ReachedBlock(Exception):  # noqa: N818 - no error, it ends a forward pass
    """Raised once the block has given its output; what comes after it is not needed."""


def middle_block(denoiser: nn.Module) -> str:
    """Return the name of the block in the middle of a denoiser, which holds what an image is about.

    Args:
        denoiser: a UNet of diffusers (its ``mid_block``, the h-space of Kwon et al., arXiv
            2210.10960) or a transformer with ``transformer_blocks`` or ``layers``.

    Raises:
        InvDiffError: if the denoiser has none of them.
    """
    if getattr(denoiser, "mid_block", None) is not None:
        return "mid_block"
    for name in ("transformer_blocks", "layers"):
        if blocks := getattr(denoiser, name, None):
            return f"{name}.{len(blocks) // 2}"
    raise InvDiffError(
        f"{type(denoiser).__name__} has neither mid_block nor transformer_blocks nor "
        "layers: name a `block`, one of its named_modules().",
        "block",
    )


class BlockFeatures:
    """Features of latents at a block of a frozen denoiser, under the empty prompt.

    All images get the same noise, so features differ only by what images show. The pass ends at
    the block, which for the middle block of a UNet saves about half of the cost.

    Args:
        denoiser: the denoiser, frozen, in evaluation mode.
        null: the denoiser's input for the empty prompt, one row.
        block: module name, as in the network's ``named_modules()``; the middle block if not given.
        levels: levels of noise, as logarithms of the signal-to-noise ratio; the features of all
            levels are concatenated.
        seed: seed of the noise.
        network: network used instead of the pipeline's own, such as the one beneath an adapter.

    Raises:
        InvDiffError: if there is no such block or level.
    """

    def __init__(
        self,
        denoiser: FrozenDenoiser,
        null: Condition,
        block: str | None = None,
        levels: Sequence[float] = LEVELS,
        seed: int = 0,
        network: Any = None,
    ) -> None:
        require_levels(levels)
        self._network = denoiser.network if network is None else network
        name = middle_block(self._network) if block is None else block
        try:
            self._block = self._network.get_submodule(name)
        except AttributeError:
            close = [each for each, _ in self._network.named_children()]
            raise InvDiffError(
                f"block={name!r}: {type(self._network).__name__} has no such module; its parts are "
                f"{', '.join(close)}.",
                "block",
            ) from None
        self._denoiser, self._null, self._seed = denoiser, without_padding(null), seed
        self._timesteps = [timestep_at(denoiser.process, level) for level in levels]

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Compute the features of latents.

        Args:
            latents: ``[B, C, H, W]`` of about unit variance, on the denoiser's device.

        Returns:
            float32 ``[B, 5 M L]`` on the latents' device, for M channels of the block and L levels.
            An image's features do not depend on the rest of the batch, up to rounding.

        Raises:
            InvDiffError: if the block's output is neither a grid nor image tokens.
        """
        noise = torch.randn(latents.shape[1:], generator=generator(self._seed, "feature noise"))
        noise = on_device(noise, latents.device).expand_as(latents)
        found = []
        for timestep in self._timesteps:
            timesteps = torch.full((len(latents),), timestep, device=latents.device)
            noisy = self._denoiser.process.add_noise(latents.float(), noise, timesteps)
            output = self._denoiser.image_tokens(self._output(noisy, timesteps))
            found.append(_pooled(output, latents.shape))
        return torch.cat(found, dim=1)

    def _output(self, noisy: Tensor, timesteps: Tensor) -> Any:
        null = repeated(self._null, len(noisy), noisy.device)
        return block_output(
            self._block,
            lambda: self._denoiser.predict(noisy, timesteps, null, self._network),
        )


def block_output(block: nn.Module, predict: Callable[[], object]) -> Any:
    """Return a block's output in a forward pass, which ends there.

    Args:
        block: a block of the denoiser.
        predict: runs the forward pass.

    Raises:
        InvDiffError: if the pass does not reach the block.
    """
    kept: list[Any] = []

    def keep(block: nn.Module, given: Any, output: Any) -> None:
        kept.append(output)
        raise _ReachedBlock

    handle = block.register_forward_hook(keep)
    try:
        # A compiled denoiser would not notice the hook.
        with torch.compiler.set_stance("force_eager"):
            predict()
    except _ReachedBlock:
        pass
    finally:
        handle.remove()
    if not kept:
        raise InvDiffError("`block` takes no part in the denoiser's forward pass.", "block")
    return kept[0]


def _pooled(output: Any, latents: Sequence[int]) -> Tensor:
    """Average a block's output over the whole image and over quarters: float32 ``[B, 5 M]``."""
    grid = _as_grid(output, latents).float()
    parts = [nn.functional.adaptive_avg_pool2d(grid, side).flatten(1) for side in _GRIDS]
    return torch.cat(parts, dim=1)


def _as_grid(output: Any, latents: Sequence[int]) -> Tensor:
    """Return a block's output, of a UNet or a transformer's image tokens, as ``[B, M, h, w]``."""
    height, width = latents[-2:]
    for each in output if isinstance(output, tuple | list) else (output,):
        if not isinstance(each, Tensor) or len(each) != latents[0]:
            continue
        if each.dim() == 4:
            return each
        if each.dim() == 3:  # tokens [B, h w, M]; those of the text have another count
            for patch in range(1, 17):
                if height % patch or width % patch:
                    continue
                if each.shape[1] == (height // patch) * (width // patch):
                    return each.transpose(1, 2).unflatten(2, (height // patch, width // patch))
    raise InvDiffError(
        "the output of `block` holds neither a grid [B, M, h, w] nor image tokens [B, h w, M].",
        "block",
    )


def image_features(
    pipeline: Any,
    latents: Tensor | Iterable[Tensor],
    *,
    block: str | None = None,
    levels: Sequence[float] = LEVELS,
    batch_size: int = 128,
    seed: int = 0,
    resolution: int | None = None,
) -> Tensor:
    """Compute features of images in one pass, for :func:`find_hidden_attributes`.

    Args:
        pipeline: a loaded pipeline of a supported family.
        latents: latents of about unit variance, ``[N, C, H, W]``, or batches of them, which are
            read one at a time.
        block: as for :class:`BlockFeatures`.
        levels: as for :class:`BlockFeatures`.
        batch_size: batch size of the forward passes if ``latents`` is a tensor.
        seed: seed of the noise that all images get.
        resolution: side of the images in pixels; the pipeline's own if not given.

    Returns:
        float16 ``[N, D]``.

    Raises:
        InvDiffError: if there are no images, features are not finite in float16, or block or
            levels are wrong (see :class:`BlockFeatures`).
    """
    denoiser = frozen_denoiser(pipeline, resolution)
    reader = BlockFeatures(denoiser, denoiser.condition([""]), block, levels, seed)
    batches = latents.split(batch_size) if isinstance(latents, Tensor) else latents
    found = [reader(batch.to(denoiser.network.device)).half().cpu() for batch in batches]
    if not found:
        raise InvDiffError("`latents`: expected at least one image, found none.", "latents")
    features = torch.cat(found)
    if (bad := first_not_finite(features)) is not None:
        raise InvDiffError(
            f"features of image {bad} (counted from 0) are not finite in float16: load the "
            "pipeline in float32 or bfloat16, or name a `block` whose outputs are smaller.",
            "block",
        )
    return features


def require_levels(levels: Sequence[float]) -> None:
    """Check that there are levels of noise, all of them finite.

    Raises:
        InvDiffError: if not.
    """
    if not levels or not all(math.isfinite(level) for level in levels):
        raise InvDiffError(
            f"levels={list(levels)}: expected logarithms of the signal-to-noise ratio, at least "
            "one.",
            "levels",
        )


class DenoisingLosses:
    """Losses of the denoiser under each image's own prompt, as in the InvDiff paper.

    All images get the same noises at the same timesteps, so losses differ only by what images
    show. It takes one pass for each (timestep, noise), 32 per image.

    Args:
        denoiser: the denoiser, frozen, in evaluation mode.
        seed: seed of the noises.
    """

    def __init__(self, denoiser: FrozenDenoiser, seed: int = 0) -> None:
        self._denoiser, self._seed = denoiser, seed
        steps = denoiser.process.train_timesteps
        self._grid = stratified_timesteps(TIMESTEPS, steps, EARLIEST, LATEST)

    @torch.no_grad()
    def __call__(self, latents: Tensor, condition: Condition) -> Tensor:
        """Compute the losses of latents.

        Args:
            latents: ``[B, C, H, W]``.
            condition: the denoiser's inputs for the images' prompts, one row per image.

        Returns:
            float32 ``[B, 32]`` on the latents' device, timestep by timestep.
        """
        process, columns = self._denoiser.process, []
        for number, timestep in enumerate(self._grid.tolist()):
            timesteps = torch.full((len(latents),), timestep, device=latents.device)
            for draw in range(NOISES):
                source = generator(self._seed, "common noise", number, draw)
                noise = torch.randn(latents.shape[1:], generator=source)
                noise = on_device(noise, latents.device).expand_as(latents)
                noisy = process.add_noise(latents, noise, timesteps)
                target = process.target(latents, noise, timesteps)
                prediction = self._denoiser.predict(noisy, timesteps, condition)
                columns.append(sample_losses(prediction, target))
        return torch.stack(columns, dim=1)
