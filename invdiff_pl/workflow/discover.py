"""Find hidden attributes of given images with a pipeline's own denoiser."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.latents import encoded_moments
from invdiff_pl.data.images import to_float
from invdiff_pl.data.latents import pixel_batches
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.environments.candidate import Candidate
from invdiff_pl.environments.discovery import Discovery
from invdiff_pl.environments.features import image_features
from invdiff_pl.environments.given_features import read_features, require_features
from invdiff_pl.environments.hidden_attribute import (
    HiddenAttributeSettings,
    find_hidden_attributes,
)
from invdiff_pl.utils.errors import InvDiffError

__all__ = ["Candidate", "Discovery", "discover"]
Embed = Callable[[Tensor], Tensor]


def discover(
    pipe: DiffusionPipeline,
    images: PromptedImages,
    *,
    embeddings: Tensor | str | Path | Embed | None = None,
    resolution: int | None = None,
    settings: HiddenAttributeSettings | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Discovery:
    """Find unlabelled attributes that go along with prompts.

    One pass of the frozen denoiser per image gives features; a mixture model tells which images of
    different prompts share something that the prompts do not name, and how unevenly it is spread
    over the prompts.

    Args:
        pipe: a loaded pipeline, on any device; it is left as it is.
        images: N images of P prompts.
        embeddings: features of your own, such as a CLIP model's: a tensor ``[N, D]``, a file that
            :func:`~invdiff_pl.environments.given_features.read_features` reads, or a function from
            images uint8 ``[B, 3, H, H]`` to ``[B, D]``. The denoiser is not used then.
        resolution: side of the images in pixels; the pipeline's own if not given.
        settings: settings of the inference.
        batch_size: number of images per batch; chosen by the resolution if not given.
        seed: seed of the noise that all images share.
        progress: whether to show a progress bar.

    Returns:
        candidates, best first; none if nothing was found.

    Raises:
        ValueError: if no prompt repeats, or the embeddings do not match the images.

    Example:
        >>> import torch
        >>> import invdiff_pl as inv
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings
        >>> prompts = ["a photo of a nurse", "a photo of a pilot"]
        >>> images = inv.PromptedImages(torch.rand(16, 3, 32, 32), prompts * 8)
        >>> few = HiddenAttributeSettings(components=4, starts=2, alpha=0.5, resamples=2)
        >>> pipe = tiny_pipeline(prompts)
        >>> found = inv.discover(pipe, images, settings=few, progress=False)
        >>> found[0].verdict  # of noise; 16 images would not tell anyway
        'untestable'
        >>> found[0].memberships.shape, found[0].conflict.shape, found[0].shares.shape
        (torch.Size([16, 2]), torch.Size([16]), torch.Size([2, 2]))
        >>> list(found[0].to_pandas().columns)
        ['prompt', 'group', 'probability', 'conflict']
    """
    if len(images.prompts) == len(images):
        raise InvDiffError(
            f"images: each of the {len(images)} prompts occurs once, and images of one prompt are "
            "compared with each other; give them prompts that repeat, such as one text for all, or "
            'PromptedImages.from_folder(folder, prompts_from="words:nurse,doctor").'
        )
    denoiser = frozen_denoiser(pipe, resolution)
    told = f"{'features' if embeddings is None else 'embeddings'} of images" if progress else None
    batches = pixel_batches(images, denoiser.resolution, batch_size, told)
    if embeddings is None:
        moments = (encoded_moments(pipe.vae, to_float(pixels)) for pixels in batches)
        latents = (denoiser.latents(part) for part in moments)
        features = image_features(pipe, latents, seed=seed, resolution=denoiser.resolution)
    else:
        features = _embedded(embeddings, batches, len(images))
    return Discovery(find_hidden_attributes(features, images.prompt_ids, settings), images)


def _embedded(
    embeddings: Tensor | str | Path | Embed, batches: Iterable[Tensor], count: int
) -> Tensor:
    """Return the user's own features, ``[N, D]``, in whatever form they are given."""
    if isinstance(embeddings, str | Path):
        return read_features(embeddings, count, argument="embeddings")
    if not isinstance(embeddings, Tensor):
        embeddings = _computed(embeddings, batches)
    require_features(embeddings, count, "embeddings", "embeddings")
    return embeddings


def _computed(embed: Embed, batches: Iterable[Tensor]) -> Tensor:
    found = [embed(pixels) for pixels in batches]
    if not all(isinstance(part, Tensor) for part in found):
        raise InvDiffError("embeddings: expected a function that returns tensors [B, D].")
    return torch.cat([part.detach().cpu() for part in found])
