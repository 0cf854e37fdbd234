"""Latents of images, computed once."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from invdiff_pl.data.cache import build_shards
from invdiff_pl.data.images import read_images, to_float

# Images that the VAE encodes at once.
_BATCH = 64


@torch.no_grad()
def encode_images(vae: AutoencoderKL, paths: Sequence[Path], resolution: int, folder: Path) -> None:
    """Cache the posterior moments of images and of their mirror images.

    Args:
        vae: encodes images; moved to the GPU if there is one.
        paths: of N images.
        resolution: side at which they are encoded, in pixels.
        folder: of the shards, float16 ``[N, 2, 2C, h, w]``: image, then mirror image.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = vae.to(device)

    def encode(rows: Sequence[int]) -> Tensor:
        moments = []
        for chunk in torch.tensor(rows).split(_BATCH):
            pixels = read_images([paths[row] for row in chunk.tolist()], resolution)
            images = to_float(pixels).to(device)
            both = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)
            encoded = vae.encode(both).latent_dist.parameters
            moments.append(encoded.unflatten(0, (-1, 2)).to("cpu", torch.float16))
        return torch.cat(moments)

    build_shards(folder, len(paths), encode, "encoding images")
