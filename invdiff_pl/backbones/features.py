"""What a frozen denoiser makes of images: features of its middle block."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from invdiff_pl.backbones.noising import NoiseProcess

# Sides of the grids that the middle block's output is averaged over.
_GRIDS = (1, 2)


def feature_width(unet: UNet2DConditionModel) -> int:
    """Length of a vector of :func:`middle_features`."""
    return int(unet.config.block_out_channels[-1]) * sum(side * side for side in _GRIDS)


@torch.no_grad()
def middle_features(
    unet: UNet2DConditionModel,
    process: NoiseProcess,
    latents: Tensor,
    timestep: int,
    noise: Tensor,
    embedding: Tensor,
) -> Tensor:
    """Output of the UNet's middle block, its h-space, pooled over the whole and over quarters.

    h-space holds what a picture is about (Kwon et al., arXiv 2210.10960). Some noise, the same for
    all images, hides what tells samples from photographs.

    Args:
        unet: the frozen denoiser.
        process: its forward process.
        latents: ``[B, C, H, W]``.
        timestep: at which they are looked at.
        noise: ``[C, H, W]``.
        embedding: of the empty prompt, ``[1, L, D]``.

    Returns:
        float32 ``[B, 5 M]`` for M channels of the middle block.
    """
    kept: list[Tensor] = []

    def keep(block: nn.Module, given: Any, hidden: Tensor) -> None:
        kept.append(hidden)

    timesteps = torch.full((len(latents),), timestep, device=latents.device)
    noisy = process.add_noise(latents, noise.to(latents).expand_as(latents), timesteps)
    handle = unet.mid_block.register_forward_hook(keep)
    try:
        given = embedding.expand(len(latents), -1, -1)
        unet(noisy.to(unet.dtype), timesteps, given.to(unet.dtype), return_dict=False)
    finally:
        handle.remove()
    hidden = kept[0].float()
    pooled = [nn.functional.adaptive_avg_pool2d(hidden, side).flatten(1) for side in _GRIDS]
    return torch.cat(pooled, dim=1)
