"""Latents held in memory, for training an adapter with any Trainer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from invdiff_pl.backbones.denoiser import in_precision
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.cache import ResidentTensor, RowSource
from invdiff_pl.data.environments import Environments, HasEnvironments, as_environments
from invdiff_pl.data.latents import encoded
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.data.training import LatentDataModule
from invdiff_pl.utils.errors import InvDiffError


class LatentsInMemory(LatentDataModule):
    """A DataModule of latents given as tensors, for any Trainer.

    Args:
        moments: moments of the VAE's posterior, float ``[N, 2C, h, w]``, or ``[N, 2, 2C, h, w]``
            with those of the mirror image second, which training then draws as often.
        prompts: the P distinct prompts.
        prompt_ids: number of each image's prompt, int64 ``[N]``.
        conditions: the denoiser's inputs for every prompt and, last, the empty one, ``P + 1``
            rows by name: ``prompt_embeds`` and, depending on the family, ``pooled_prompt_embeds``
            and ``prompt_attention_mask``.
        environments: environments of the N images, in any form that
            :func:`~invdiff_pl.data.environments.as_environments` takes; without them, batches are
            shuffled.
        settings: as for :class:`LatentDataModule`.

    Raises:
        ValueError: if the tensors disagree in their numbers of images or prompts.

    Example:
        >>> data = LatentsInMemory(  # of 8 images, 4 of each prompt
        ...     torch.randn(8, 2 * 4, 16, 16),
        ...     ["a photo of a nurse", "a photo of a pilot"],
        ...     torch.arange(8) % 2,
        ...     {"prompt_embeds": torch.randn(3, 16, 32)},
        ...     torch.arange(8) // 4,
        ...     held_out=0.25,
        ... )
        >>> data.inferred().groups, int(data.held_out().sum())
        (2, 2)
    """

    def __init__(
        self,
        moments: Tensor,
        prompts: Sequence[str],
        prompt_ids: Tensor,
        conditions: Mapping[str, Tensor],
        environments: HasEnvironments | Environments | Tensor | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if len(moments) != len(prompt_ids):
            raise InvDiffError(f"moments are of {len(moments)} images, not {len(prompt_ids)}.")
        if wrong := [name for name, rows in conditions.items() if len(rows) != len(prompts) + 1]:
            raise InvDiffError(
                f"conditions: {wrong[0]} holds {len(conditions[wrong[0]])} prompts: expected "
                f"{len(prompts)} and, last, the empty one."
            )
        both = moments if moments.ndim == 5 else torch.stack([moments, moments], dim=1)
        self._moments = ResidentTensor(both)
        self._prompts = tuple(prompts)
        self._prompt_ids = prompt_ids
        self._conditions = conditions
        self._environments = (
            None if environments is None else as_environments(environments, len(moments))
        )

    @classmethod
    def from_images(
        cls,
        pipe: DiffusionPipeline,
        images: PromptedImages,
        environments: HasEnvironments | Environments | Tensor | None = None,
        *,
        resolution: int | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> "LatentsInMemory":
        """Encode images and their prompts with a pipeline's own VAE and text encoder.

        Args:
            pipe: a loaded pipeline, on any device; it is left as it is.
            images: N images with prompts.
            environments: as for the class.
            resolution: side of the images in pixels; the pipeline's own if not given.
            progress: whether to show a progress bar.
            settings: as for :class:`LatentDataModule`.

        Raises:
            ValueError: if the environments do not match the images.

        Example:
            >>> from invdiff_pl import PromptedImages
            >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
            >>> images = PromptedImages(torch.rand(4, 3, 32, 32), ["a nurse", "a pilot"] * 2)
            >>> pipe = tiny_pipeline(images.prompts)
            >>> data = LatentsInMemory.from_images(pipe, images, progress=False)
            >>> data.moments().shape, data.conditions()[:]["prompt_embeds"].shape
            ((2, 8, 16, 16), torch.Size([3, 16, 16]))
        """
        # Checked before anything is encoded.
        groups = None if environments is None else as_environments(environments, len(images))
        denoiser = frozen_denoiser(pipe, resolution)
        told = "encoding images" if progress else None
        return cls(
            torch.cat(list(encoded(pipe.vae, images, denoiser.resolution, told=told))),
            images.prompts,
            images.prompt_ids,
            denoiser.condition([*images.prompts, ""]),
            groups,
            **settings,
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """The distinct prompts."""
        return self._prompts

    @property
    def has_environments(self) -> bool:
        """Whether environments were given."""
        return self._environments is not None

    def train_prompts(self) -> Tensor:
        """Return the number of each image's prompt, int64 ``[N]``."""
        return self._prompt_ids

    def moments(self) -> RowSource:
        """Return the moments of the latents."""
        return self._moments

    def conditions(self) -> Conditions:
        """Return the denoiser's inputs for every prompt and, last, the empty one."""
        return Conditions(in_precision(self._conditions, torch.float32), self._prompts).cpu()

    def inferred(self) -> Environments:
        """Return the environments.

        Raises:
            ValueError: if none were given.
        """
        if self._environments is None:
            raise InvDiffError("environments: none were given.")
        return self._environments
