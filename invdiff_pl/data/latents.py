"""Latents of images, computed once."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from invdiff_pl.backbones.latents import encoded_moments
from invdiff_pl.data.cache import build_shards
from invdiff_pl.data.images import read_images, to_float
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.utils.progress import track
from invdiff_pl.utils.resources import require_room

# Most images and most pixels that the VAE encodes at once: eight images at 512×512, whose largest
# activations, of both flips at 128 channels, take 2 GiB each.
_BATCH = 64
_PIXELS = 1 << 21


@torch.no_grad()
def posterior_moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Compute the moments of the posterior of images and of their mirror images.

    Args:
        vae: VAE with C latent channels, in any dtype and on any device.
        pixels: uint8 ``[B, 3, H, W]``.

    Returns:
        float16 ``[B, 2, 2C, h, w]`` on the CPU: image, then mirror image.
    """
    images = to_float(pixels)
    both = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)
    return encoded_moments(vae, both).unflatten(0, (-1, 2)).to("cpu", torch.float16)


def encoded(
    vae: AutoencoderKL,
    images: PromptedImages,
    resolution: int,
    batch_size: int | None = None,
    told: str | None = None,
) -> Iterator[Tensor]:
    """Yield :func:`posterior_moments` of images; for the arguments see :func:`pixel_batches`."""
    for pixels in pixel_batches(images, resolution, batch_size, told):
        yield posterior_moments(vae, pixels)


def pixel_batches(
    images: PromptedImages, resolution: int, batch_size: int | None = None, told: str | None = None
) -> Iterator[Tensor]:
    """Yield images in order, one batch at a time, uint8 ``[B, 3, H, W]``.

    Args:
        images: N images.
        resolution: side in pixels at which they are read.
        batch_size: number of images per batch; as many as are encoded at once if not given.
        told: text of a progress bar; there is none if not given.
    """
    batches = torch.arange(len(images)).split(batch_size or _batch(resolution))
    for rows in batches if told is None else track(batches, told, unit="batch"):
        yield images.pixels(rows.tolist(), resolution)


def encode_images(vae: AutoencoderKL, paths: Sequence[Path], resolution: int, folder: Path) -> None:
    """Cache the posterior moments of images and of their mirror images.

    Args:
        vae: VAE that encodes the images; moved to the GPU if there is one.
        paths: paths of N images.
        resolution: side in pixels at which they are encoded.
        folder: folder of the shards, float16 ``[N, 2, 2C, h, w]``: image, then mirror image.

    Raises:
        InvDiffError: if the moments do not fit on the folder's disk.
    """
    vae = vae.to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(rows: Iterable[int]) -> Tensor:
        chunks = torch.tensor(list(rows)).split(_batch(resolution))
        pixels = (read_images([paths[row] for row in chunk], resolution) for chunk in chunks)
        return torch.cat([posterior_moments(vae, some) for some in pixels])

    levels = vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
    channels, scale = vae.config.latent_channels, 2 ** (len(levels) - 1)
    row = 2 * 2 * channels * (resolution // scale) ** 2 * torch.float16.itemsize
    done = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    require_room(folder, len(paths) * row - done, f"the latents of {len(paths)} images")
    build_shards(folder, len(paths), encode, "encoding images")


def _batch(resolution: int) -> int:
    return max(1, min(_BATCH, _PIXELS // resolution**2))
