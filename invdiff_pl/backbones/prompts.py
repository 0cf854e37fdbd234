"""Prompts encoded for a denoiser, each prompt once."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from invdiff_pl.backbones.denoiser import FrozenDenoiser, in_precision, without_padding
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import load_pipeline


class Conditions(nn.Module):
    """A denoiser's inputs for each of P prompts and, last, for the empty one.

    It is a module, so that it moves to a device with the module that holds it, but it is not saved
    in state dicts. Padding that no prompt needs is left out.

    Args:
        rows: tensors by the names of the pipeline's arguments, such as
            ``prompt_embeds [P + 1, L, D]``.
        prompts: the P texts, where they are needed.

    Example:
        >>> conditions = Conditions({"prompt_embeds": torch.randn(3, 16, 32)})
        >>> len(conditions), conditions[torch.tensor([0, 0, 1])]["prompt_embeds"].shape
        (3, torch.Size([3, 16, 32]))
    """

    def __init__(self, rows: Mapping[str, Tensor], prompts: Sequence[str] = ()) -> None:
        super().__init__()
        self.prompts = tuple(prompts)
        for name, value in without_padding(rows).items():
            self.register_buffer(name, value, persistent=False)

    def rows(self) -> dict[str, Tensor]:
        """Return all rows, by name."""
        return dict(self.named_buffers())

    def __len__(self) -> int:
        return len(next(self.buffers()))

    def __getitem__(self, chosen: Tensor | slice) -> dict[str, Tensor]:
        return {name: value[chosen] for name, value in self.named_buffers()}

    @property
    def null(self) -> dict[str, Tensor]:
        """The row of the empty prompt."""
        return self[-1:]


class EncodesPrompts(Protocol):
    """Encodes prompts for a denoiser, as a denoiser with text encoders does itself."""

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return one row for each of P prompts, by the names of the pipeline's arguments."""


class TextEncoders:
    """A backbone's text encoders, which are loaded when the first prompt is encoded.

    Args:
        backbone: pipeline folder, hub id or ``asset:NAME``.
        resolution: side of the images in pixels.
        weights: how to hold the weights, see :func:`~invdiff_pl.backbones.pipeline.load_pipeline`.
    """

    def __init__(self, backbone: str, resolution: int, weights: str = "float32") -> None:
        self._given = backbone, weights
        self._resolution = resolution

    @cached_property
    def _loaded(self) -> FrozenDenoiser:
        pipeline = load_pipeline(*self._given, with_denoiser=False)
        return frozen_denoiser(pipeline, self._resolution)

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode P prompts, one row each, on the CPU."""
        return self._loaded.condition(prompts)


class KnownPrompts:
    """Numbers prompts in the order in which they are met, and keeps their encodings.

    Args:
        encoders: text encoders of the backbone that the encodings are for.
        prompts: prompts known from the start.
    """

    def __init__(self, encoders: EncodesPrompts, prompts: Sequence[str] = ()) -> None:
        self._encoders = encoders
        self._numbers: dict[str, int] = {}
        self._rows: list[dict[str, Tensor]] = []
        self._null: dict[str, Tensor] | None = None
        self.numbers(prompts)

    def __len__(self) -> int:
        return len(self._numbers)

    def numbers(self, prompts: Sequence[str]) -> Tensor:
        """Return the number of each prompt, int64 ``[B]``; new ones are encoded."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._numbers]
        if new:
            self._rows.append(in_precision(self._encoders.condition(new), torch.float32))
            self._numbers |= {prompt: len(self._numbers) + n for n, prompt in enumerate(new)}
        return torch.tensor([self._numbers[prompt] for prompt in prompts], dtype=torch.int64)

    def conditions(self) -> Conditions:
        """Return the encodings of all prompts and, last, of the empty one."""
        if self._null is None:
            self._null = in_precision(self._encoders.condition([""]), torch.float32)
        parts = [*self._rows, self._null]
        rows = {name: torch.cat([each[name] for each in parts]) for name in parts[0]}
        return Conditions(rows, tuple(self._numbers))
