"""Every way to make environments of scores, behind one function."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.environments.partition import partition, soft_spread
from invdiff_pl.environments.soft import (
    gradient_memberships,
    mixture_memberships,
    vector_memberships,
)
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.names import PARTITIONS, require_name


@dataclass(frozen=True)
class Assignment:
    """Environments of images, soft and hard.

    Attributes:
        memberships: float32 ``[N, G]``, rows with sum 1.
        assignments: int64 ``[N]``, the likeliest of each.
        objective: the spread that the memberships reach.
    """

    memberships: Tensor
    assignments: Tensor
    objective: float


def assign(
    scores: Tensor,
    prompts: Tensor,
    groups: int = 2,
    *,
    method: str = "exact",
    minimum_share: float = 0.01,
    objective: str = "between",
    table: Tensor | None = None,
    seed: int = 0,
) -> Assignment:
    """Make environments of scores.

    Args:
        scores: ``[N]``.
        prompts: int64 ``[N]``.
        groups: G.
        method: ``exact``, the partition of largest spread; ``mixture``, soft memberships of a
            mixture of the scores that all prompts share; ``vector``, of a mixture of all columns
            of ``table``, each prompt by itself; both start from the exact partition. Or
            ``gradient``, the reference's ascent, which mixes all prompts.
        minimum_share: see :func:`invdiff_pl.environments.partition.partition`.
        objective: likewise.
        table: standardised scores ``[N, D]``, for ``vector``.
        seed: of ``gradient``'s start.

    Raises:
        InvDiffError: if there is no such method, a setting is out of range, or ``vector`` has no
            table.
    """
    require_name("partition", method, PARTITIONS)
    exact = partition(scores, prompts, groups, minimum_share, objective)
    if method == "exact":
        hard = one_hot(exact.assignments, groups).float()
        return Assignment(hard, exact.assignments, exact.objective)
    if method == "gradient":
        memberships = gradient_memberships(scores, groups, seed)
    elif method == "mixture":
        memberships = mixture_memberships(scores, prompts, exact.assignments)
    elif table is None:
        raise InvDiffError("partition=vector needs a table of several scores.", "partition")
    else:
        memberships = vector_memberships(table, prompts, exact.assignments)
    memberships = torch.nn.functional.pad(memberships, (0, groups - memberships.shape[1]))
    spread = soft_spread(scores, prompts, memberships, objective)
    return Assignment(memberships, memberships.argmax(1), spread)


def cross(first: Assignment, second: Assignment) -> Assignment:
    """Environments of two attributes at once: each group of the one by each of the other.

    Environment 0 is that of both attributes' groups 0; with two groups each, 1 is unusual in the
    first attribute only, 2 in the second only, 3 in both.

    Args:
        first: of N images in G groups.
        second: of the same images in H groups.

    Returns:
        G times H groups; the objective is the sum of both.
    """
    groups = first.memberships.shape[1]
    pairs = second.memberships[:, :, None] * first.memberships[:, None, :]
    return Assignment(
        memberships=pairs.flatten(1),
        assignments=first.assignments + groups * second.assignments,
        objective=first.objective + second.objective,
    )
