"""Draw images with a pipeline, as a data set of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import sample_images
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.progress import track


def generate(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    per_prompt: int = 512,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> PromptedImages:
    """Draw images of prompts, through the pipeline's own call.

    Image i starts from noise seeded by (seed, i), whatever the batch size.

    Args:
        pipe: a loaded pipeline, on any device; it is left as it is.
        prompts: P texts, or one.
        per_prompt: number of images per prompt; attributes that show in details, such as the
            gender of small faces, are found among 3000 images in all.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance; 1 is none.
        batch_size: number of images drawn together.
        seed: seed of the noises.
        progress: whether to show a progress bar.

    Returns:
        ``P * per_prompt`` images, those of the first prompt first.

    Raises:
        ValueError: if there is no prompt, or pixels are not finite.

    Example:
        >>> import invdiff_pl as inv
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> prompts = ["a photo of a nurse", "a photo of a pilot"]
        >>> pipe = tiny_pipeline(prompts)
        >>> images = inv.generate(pipe, prompts, per_prompt=2, steps=1, progress=False)
        >>> images.prompt_ids.tolist(), images[0][0].size
        ([0, 0, 1, 1], (32, 32))
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(texts):
        raise InvDiffError("prompts: expected at least one, none of them empty.")
    if per_prompt < 1:
        raise InvDiffError(f"per_prompt={per_prompt}: expected at least 1.")
    conditions = Conditions(frozen_denoiser(pipe).condition([*texts, ""]))
    batches = torch.arange(len(texts) * per_prompt).split(batch_size)
    with silent(pipe):
        drawn = [
            sample_images(
                pipe,
                conditions[rows // per_prompt],
                conditions.null,
                rows.tolist(),
                seed=seed,
                steps=steps,
                guidance_scale=guidance_scale,
            )
            for rows in (track(batches, "drawing images", unit="batch") if progress else batches)
        ]
    return PromptedImages(torch.cat(drawn), [text for text in texts for _ in range(per_prompt)])


@contextmanager
def silent(pipe: Any) -> Iterator[None]:
    """Turn off the pipeline's own progress bar, of which there would be one per batch."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
