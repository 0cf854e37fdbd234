"""A stage in both recipes, and what stages have in common."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_work import ReferenceInputs, Work

from invdiff_pl.data.latents import encode_images


@dataclass
class Stage:
    """One stage in both recipes.

    Attributes:
        name: name of the stage.
        unit: unit that is counted.
        reference: one round of the reference's recipe.
        ours: one round of ours.
        counts: number of units in a round of each.
        parity: how closely both agree on the same draws.
        required: floating-point operations that a unit needs.
        waits: seconds that each has waited for data so far, by ``reference`` and ``ours``.
    """

    name: str
    unit: str
    reference: Callable[[], object]
    ours: Callable[[], object]
    counts: tuple[int, int]
    parity: str = ""
    required: int = 0
    waits: dict[str, float] = field(default_factory=dict)


def autocast(work: Work, half: bool) -> torch.autocast:
    """Return a context with bf16 matrix products, or one without effect."""
    return torch.autocast(work.device.type, torch.bfloat16, enabled=half)


def prepare(work: Work, inputs: ReferenceInputs, folder: Path) -> None:
    """Build our cache of moments, without its progress bar."""
    with contextlib.redirect_stdout(io.StringIO()):
        encode_images(inputs.pipeline.vae, work.paths, inputs.side, folder)
