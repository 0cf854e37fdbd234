"""What the environment stage found, as training reads it: memberships, and nothing of labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.backbones.draws import generator
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json
from invdiff_pl.utils.tensors import read_tensors, require_range


@dataclass(frozen=True)
class Environments:
    """Environments of the N images of the train split.

    Attributes:
        memberships: float32 ``[N, G]``, rows with sum 1: of one 1 where assignments are hard.
        bias_found: whether the inference found a bias at all; ``None`` if it did not test.
        withheld: why nothing should be trained on them: the inference found no bias, or could not
            test for one; ``None`` where it found one, or nothing is told.
        timesteps: at which images were scored, ascending; empty if not told.
        timestep_weights: how well each tells the environments apart; empty if not told.
    """

    memberships: Tensor
    bias_found: bool | None = None
    withheld: str | None = None
    timesteps: tuple[int, ...] = ()
    timestep_weights: tuple[float, ...] = ()

    @property
    def groups(self) -> int:
        """G."""
        return self.memberships.shape[1]

    @property
    def assignments(self) -> Tensor:
        """The likeliest environment of each image, int64 ``[N]``."""
        return self.memberships.argmax(1)


class HasMemberships(Protocol):
    """What images are grouped by, such as a candidate that :func:`invdiff_pl.discover` found."""

    @property
    def memberships(self) -> Tensor:
        """Of N images in G environments, ``[N, G]``, rows with sum 1."""


def as_environments(given: HasMemberships | Tensor, count: int) -> Environments:
    """Environments of images, however they are told.

    Args:
        given: environment numbers int64 ``[N]``; memberships ``[N, G]``, or what has them, of which
            the largest counts; or :class:`Environments`, which are taken as they are.
        count: N.

    Raises:
        ValueError: if they are not of as many images, or of fewer than two environments.

    Example:
        >>> as_environments(torch.tensor([0, 1, 1]), count=3).memberships.tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    values = given if isinstance(given, Tensor) else given.memberships
    if len(values) != count:
        raise InvDiffError(f"environments: they are of {len(values)} images, not of {count}.")
    if isinstance(given, Environments):
        return given
    numbers = values.long() if values.ndim == 1 else values.argmax(1)
    groups = int(numbers.max()) + 1 if values.ndim == 1 else values.shape[1]
    if int(numbers.min()) < 0 or groups < 2:
        raise InvDiffError("environments: expected numbers from 0 of at least two environments.")
    return Environments(one_hot(numbers.cpu(), groups).float())


def read_environments(folder: Path, count: int, soft: bool = False) -> Environments:
    """Read the environment stage's folder.

    Args:
        folder: of ``environments.safetensors`` and, where there is one, ``environments.json``.
        count: images of the train split, N.
        soft: take the soft ``memberships`` instead of the hard ``assignments``.

    Raises:
        InvDiffError: if the stage has not run, was run on other images, or did not write soft
            memberships that are asked for.
    """
    file = folder / "environments.safetensors"
    if not file.is_file():
        raise InvDiffError(f"{file} is missing: run the environments stage first.")
    rerun = "rerun the environments stage on this data set"
    tensors = read_tensors(file, rerun, assignments=1)
    facts = folder / "environments.json"
    told = read_json(facts) if facts.is_file() else {}
    assignments = tensors["assignments"]
    if len(assignments) != count:
        raise InvDiffError(
            f"{file} assigns {len(assignments)} images but the train split has {count}: {rerun}."
        )
    require_range(file, rerun, "assignments", assignments, 0, count)
    if soft:
        if "memberships" not in tensors:
            raise InvDiffError(
                f"soft_environments=true, but {file} holds no memberships: choose a "
                "partition that gives soft ones in the environments stage, or leave it false.",
                "soft_environments",
            )
        memberships = tensors["memberships"].float()
    else:
        groups = max(int(assignments.max()) + 1, int(told.get("groups") or 1))
        memberships = torch.nn.functional.one_hot(assignments, groups).float()
    found = told.get("bias_found")
    return Environments(
        memberships,
        bias_found=None if found is None else bool(found),
        withheld=_withheld(told) if "bias_found" in told else None,
        timesteps=tuple(told.get("timesteps") or ()),
        timestep_weights=tuple(told.get("timestep_weights") or ()),
    )


def _withheld(told: dict[str, Any]) -> str | None:
    if told["bias_found"]:
        return None
    reason = (told.get("evidence") or {}).get("reason")
    verdict = (
        "the inference did not test for a bias"
        if told["bias_found"] is None
        else "the inference found no bias"
    )
    return f"{verdict} ({reason})" if reason else verdict


def held_out(prompt_ids: Tensor, assignments: Tensor, share: float, seed: int) -> Tensor:
    """Which images training never sees, so that risks can be measured on them.

    Every environment gives the same share, rounded to whole images (of three images none at a
    share of 0.1, of five one), and each prompt in it that share to within one image, so that many
    prompts of few images give theirs, too.

    Args:
        prompt_ids: int64 ``[N]``.
        assignments: int64 ``[N]``.
        share: in [0, 1).
        seed: of the draw.

    Returns:
        bool ``[N]``.

    Raises:
        InvDiffError: if the share is out of range.
    """
    if not 0 <= share < 1:
        raise InvDiffError(f"held_out={share}: expected a share from 0 to below 1.", "held_out")
    # Environment by environment, prompt by prompt, in random order within; then at even steps.
    order = torch.randperm(len(prompt_ids), generator=generator(seed, "held out"))
    order = order[prompt_ids[order].argsort(stable=True)]
    order = order[assignments[order].argsort(stable=True)]
    sizes = assignments.bincount()
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(len(order)) - starts[assignments[order]]
    chosen = torch.empty(len(order), dtype=torch.bool)
    chosen[order] = _rounded((places + 1) * share) > _rounded(places * share)
    return chosen


def _rounded(values: Tensor) -> Tensor:
    # Half up; products such as 10 * 0.1 must not fall below what they stand for.
    return (values.double() + 0.5 + 1e-9).floor()
