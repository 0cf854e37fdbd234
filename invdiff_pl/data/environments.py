"""Environments as training reads them: memberships, and no labels."""

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.backbones.draws import generator
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file, read_json
from invdiff_pl.utils.tensors import read_tensors, require_range


@dataclass(frozen=True)
class Environments:
    """Environments of the N images of the train split.

    Attributes:
        memberships: float32 ``[N, G]``; rows sum to 1, and are one-hot if assignments are hard.
        bias_found: whether the inference found a bias at all; ``None`` if it did not test.
        withheld: why nothing should be trained on them: the inference found no bias, or could not
            test for one; ``None`` if it found one, a person chose them, or nothing is known.
        candidates: candidates that they are made from; empty if unknown.
    """

    memberships: Tensor
    bias_found: bool | None = None
    withheld: str | None = None
    candidates: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        """G, the number of environments."""
        return self.memberships.shape[1]

    @property
    def assignments(self) -> Tensor:
        """The likeliest environment of each image, int64 ``[N]``."""
        return self.memberships.argmax(1)


class HasEnvironments(Protocol):
    """Anything with environments, such as a candidate that :func:`invdiff_pl.discover` found."""

    @property
    def environments(self) -> Tensor:
        """Memberships of N images in G environments, ``[N, G]``; rows sum to 1."""


def usual_first(memberships: Tensor, prompts: Tensor) -> Tensor:
    """Number the values of an attribute by how usual they are in each prompt.

    So environment 0 holds what a bias favours and the last one what goes most against it, in any
    prompt; their risks differ if a model has learned the bias.

    Args:
        memberships: memberships in the values, ``[N, G]``.
        prompts: int64 ``[N]``.

    Returns:
        memberships in the environments, ``[N, G]``.

    Example:
        >>> values = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> usual_first(values, torch.tensor([0, 0, 1, 1])).tolist()
        [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    """
    counts = memberships.new_zeros((int(prompts.max()) + 1, memberships.shape[1]))
    order = counts.index_add_(0, prompts, memberships).argsort(dim=1, descending=True, stable=True)
    return memberships.gather(1, order[prompts])


def crossed(first: Tensor, second: Tensor) -> Tensor:
    """Compute memberships in all pairs of two attributes' environments.

    Args:
        first: memberships of N images in G environments, ``[N, G]``.
        second: memberships in H environments, ``[N, H]``.

    Returns:
        ``[N, G H]``; with two environments each, 1 is unusual in the first attribute only, 2 in the
        second only, 3 in both.
    """
    return (second[:, :, None] * first[:, None, :]).flatten(1)


def as_environments(given: HasEnvironments | Environments | Tensor, count: int) -> Environments:
    """Convert environments of images from any form.

    Args:
        given: environment numbers int64 ``[N]``; memberships ``[N, G]``, or an object that has
            them, of which the largest counts; or :class:`Environments`, which are taken as they
            are.
        count: N, the number of images.

    Raises:
        ValueError: if the number of images differs, or there are fewer than two environments.

    Example:
        >>> as_environments(torch.tensor([0, 1, 1]), count=3).memberships.tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    if isinstance(given, Environments):
        values = given.memberships
    else:
        values = given if isinstance(given, Tensor) else given.environments
    if len(values) != count:
        raise InvDiffError(f"environments: they are of {len(values)} images, not of {count}.")
    if isinstance(given, Environments):
        return given
    numbers = values.long() if values.ndim == 1 else values.argmax(1)
    groups = int(numbers.max()) + 1 if values.ndim == 1 else values.shape[1]
    if int(numbers.min()) < 0 or groups < 2:
        raise InvDiffError("environments: expected numbers from 0 of at least two environments.")
    return Environments(one_hot(numbers.cpu(), groups).float())


def read_environments(
    folder: Path, count: int, soft: bool = False, candidate: int | str | None = None
) -> Environments:
    """Read the environment stage's folder.

    Args:
        folder: folder of ``environments.safetensors`` and, if there is one, ``environments.json``.
        count: N, the number of images of the train split.
        soft: take the soft ``memberships`` instead of the hard ``assignments``.
        candidate: number of the candidate that a person chose, or several as ``"0,1"``, which are
            crossed; the inference's own choice if not given.

    Raises:
        InvDiffError: if the stage has not run, was run on other images, has no such candidate, or
            did not write the soft memberships that are asked for.
    """
    if not is_file(folder / "environments.safetensors"):
        raise InvDiffError(
            f"{folder / 'environments.safetensors'} is missing: run the environments stage first."
        )
    facts = folder / "environments.json"
    told = read_json(facts) if facts.is_file() else {}
    if candidate is None:
        found = told.get("bias_found")
        return Environments(
            _memberships(folder, count, soft, told.get("groups")),
            bias_found=None if found is None else bool(found),
            withheld=_withheld(told) if "bias_found" in told else None,
            candidates=(told["candidate"],) if told.get("candidate") is not None else (),
        )
    chosen = candidate_numbers(candidate)
    known = told.get("candidates") or []
    if max(chosen) >= len(known):
        there = f"candidates 0 to {len(known) - 1}" if known else "no candidate"
        raise InvDiffError(f"candidate={candidate}: {folder} holds {there}.", "candidate")
    parts = [
        _memberships(folder / f"candidate-{number}", count, soft, known[number]["groups"])
        for number in chosen
    ]
    return Environments(reduce(crossed, parts), candidates=chosen)


def candidate_numbers(candidate: int | str) -> tuple[int, ...]:
    """Parse numbers of candidates, given as ``2`` or ``"0,1"``.

    Raises:
        InvDiffError: if they are not distinct whole numbers from 0 on.
    """
    words = str(candidate).replace(" ", "").split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise InvDiffError(
            f"candidate={candidate}: expected a number, such as 2, or different ones that are "
            "crossed, such as 0,1.",
            "candidate",
        )
    return tuple(int(word) for word in words)


def _memberships(folder: Path, count: int, soft: bool, groups: Any) -> Tensor:
    """Read the memberships of a folder's environments, float32 ``[N, G]``."""
    file, rerun = folder / "environments.safetensors", "rerun the environments stage on this data"
    tensors = read_tensors(file, rerun, assignments=1)
    assignments = tensors["assignments"]
    if len(assignments) != count:
        raise InvDiffError(
            f"{file} assigns {len(assignments)} images but the train split has {count}: {rerun}."
        )
    require_range(file, rerun, "assignments", assignments, 0, count)
    if not soft:
        return one_hot(assignments, max(int(assignments.max()) + 1, int(groups or 1))).float()
    if "memberships" not in tensors:
        raise InvDiffError(
            f"soft_environments=true, but {file} holds no memberships: rerun the environments "
            "stage, or leave it false.",
            "soft_environments",
        )
    return tensors["memberships"].float()


def _withheld(told: dict[str, Any]) -> str | None:
    if told["bias_found"]:
        return None
    verdict = (
        "the inference did not test for a bias"
        if told["bias_found"] is None
        else "the inference found no bias"
    )
    reason = str(told.get("reason") or "").removesuffix(".")
    return f"{verdict} ({reason})" if reason else verdict


def held_out(prompt_ids: Tensor, assignments: Tensor, share: float, seed: int) -> Tensor:
    """Choose images that training never sees, so that risks can be measured on them.

    Every environment gives the same share, rounded to whole images (at a share of 0.1, none of
    three images and one of five), and each prompt in it that share to within one image, so that
    many prompts of few images give theirs, too.

    Args:
        prompt_ids: int64 ``[N]``.
        assignments: int64 ``[N]``.
        share: share of the images, in [0, 1).
        seed: seed of the draw.

    Returns:
        bool ``[N]``.

    Raises:
        InvDiffError: if the share is out of range.
    """
    if not 0 <= share < 1:
        raise InvDiffError(f"held_out={share}: expected a share from 0 to below 1.", "held_out")
    # Sorted by environment, then prompt, in random order within; then taken at even steps.
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
    # Rounds half up; products such as 10 * 0.1 must not fall below what they stand for.
    return (values.double() + 0.5 + 1e-9).floor()
