"""Latents of images, computed once."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from invdiff_pl.data.cache import build_shards
from invdiff_pl.data.images import read_images, to_float
from invdiff_pl.utils.resources import require_room

# Images that the VAE encodes at once, and their pixels: at 512×512 there are eight, whose largest
# activations, of both flips at 128 channels, take 2 GiB each.
_BATCH = 64
_PIXELS = 1 << 21


@torch.no_grad()
def encode_images(vae: AutoencoderKL, paths: Sequence[Path], resolution: int, folder: Path) -> None:
    """Cache the posterior moments of images and of their mirror images.

    Args:
        vae: encodes images; moved to the GPU if there is one.
        paths: of N images.
        resolution: side at which they are encoded, in pixels.
        folder: of the shards, float16 ``[N, 2, 2C, h, w]``: image, then mirror image.

    Raises:
        InvDiffError: if they do not fit on the folder's disk.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = vae.to(device)
    batch = max(1, min(_BATCH, _PIXELS // resolution**2))

    def encode(rows: Sequence[int]) -> Tensor:
        moments = []
        for chunk in torch.tensor(rows).split(batch):
            pixels = read_images([paths[row] for row in chunk.tolist()], resolution)
            images = to_float(pixels).to(device)
            both = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)
            encoded = vae.encode(both).latent_dist.parameters
            moments.append(encoded.unflatten(0, (-1, 2)).to("cpu", torch.float16))
        return torch.cat(moments)

    channels, scale = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    row = 2 * 2 * channels * (resolution // scale) ** 2 * torch.float16.itemsize
    done = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    require_room(folder, len(paths) * row - done, f"the latents of {len(paths)} images")
    build_shards(folder, len(paths), encode, "encoding images")
