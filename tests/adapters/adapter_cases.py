"""What the tests of adapters share."""

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from invdiff_pl.adapters import Adapter
from invdiff_pl.backbones.pipeline import embed_prompts, sample_images


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and text embeddings for the tiny backbone."""
    source = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, 4, 16, 16, generator=source),
        torch.tensor([1, 500, 999]),
        torch.randn(3, 7, 16, generator=source),
    )


def disturb(adapter: Adapter) -> None:
    """Move every trainable weight, as training would."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))


@torch.no_grad()
def draw_images(pipeline: StableDiffusionPipeline) -> Tensor:
    """Two images of one prompt, uint8."""
    embeddings = embed_prompts(pipeline, ["a photo of a mallard", ""])
    return sample_images(
        pipeline,
        embeddings[:1].repeat(2, 1, 1),
        embeddings[1:],
        [4, 5],
        seed=3,
        steps=3,
        guidance_scale=2.0,
    )
