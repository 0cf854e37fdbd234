"""Prompts that a training run has met, each embedded once."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from invdiff_pl.backbones.pipeline import embed_prompts


class KnownPrompts:
    """Numbers prompts in the order in which they are met, and keeps their embeddings.

    Args:
        pipeline: whose text encoder embeds them.
        prompts: known from the start.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, prompts: Sequence[str] = ()) -> None:
        self._pipeline = pipeline
        self._numbers: dict[str, int] = {}
        self._rows: list[Tensor] = []
        self._null: Tensor | None = None
        self.numbers(prompts)

    def __len__(self) -> int:
        return len(self._numbers)

    def numbers(self, prompts: Sequence[str]) -> Tensor:
        """The number of each prompt, int64 ``[B]``; new ones are embedded."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._numbers]
        if new:
            self._rows.append(embed_prompts(self._pipeline, new).float())
            self._numbers |= {prompt: len(self._numbers) + n for n, prompt in enumerate(new)}
        return torch.tensor([self._numbers[prompt] for prompt in prompts], dtype=torch.int64)

    def embeddings(self) -> Tensor:
        """Embeddings of all of them and, last, of the empty prompt: float32 ``[P + 1, L, D]``."""
        if self._null is None:
            self._null = embed_prompts(self._pipeline, [""]).float()
        return torch.cat([*self._rows, self._null])
