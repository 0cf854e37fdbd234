"""Environments from scores: the partition that maximises the spread of group risks.

With one score an image the best partition of a prompt's images is a cut of the sorted scores, so
it is found exactly in O(N log N); no gradient ascent is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.names import SPREADS, require_name


@dataclass(frozen=True)
class Partition:
    """Environments of images.

    Attributes:
        assignments: int64 ``[N]``; within a prompt, environment 0 has the lowest scores.
        objective: the spread reached, as :func:`group_spread` has it.
    """

    assignments: Tensor
    objective: float


def partition(
    scores: Tensor,
    prompts: Tensor,
    groups: int = 2,
    minimum_share: float = 0.01,
    objective: str = "between",
) -> Partition:
    """Cut each prompt's images into environments, maximising the spread of their mean scores.

    Args:
        scores: ``[N]``.
        prompts: int64 ``[N]``.
        groups: G, at least 1.
        minimum_share: of a prompt's images, in [0, 1/G], that each environment must hold; at
            least one image in any case. A prompt with fewer than G images is left whole.
        objective: ``between``, the variance between groups weighted by their mass (two-means for
            G = 2); or ``std``, the plain standard deviation of group means that the reference
            maximises, for G = 2.

    Returns:
        the exact maximiser.

    Raises:
        InvDiffError: if a setting is out of range.
    """
    require_partition(groups, minimum_share, objective)
    assignments = torch.zeros(len(scores), dtype=torch.int64)
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        if len(rows) < groups:
            continue
        values, order = scores[rows].double().sort(stable=True)
        least = max(1, -int(-minimum_share * len(rows) // 1))
        if least * groups > len(rows):
            least = len(rows) // groups
        cuts = _best_cuts(values, groups, least, objective)
        numbers = torch.bucketize(torch.arange(len(rows)), torch.tensor(cuts), right=True)
        assignments[rows[order]] = numbers
    return Partition(assignments, group_spread(scores, prompts, assignments, objective))


def require_partition(groups: int, minimum_share: float, objective: str) -> None:
    """Refuse settings of :func:`partition`.

    Raises:
        InvDiffError: if one is out of range.
    """
    require_name("objective", objective, SPREADS)
    if objective == "std" and groups > 2:
        raise InvDiffError(
            "objective=std is exact for groups=2 only: use between.", "objective", "groups"
        )
    if groups < 1 or not 0 <= minimum_share * groups <= 1:
        raise InvDiffError(
            f"minimum_share={minimum_share} with groups={groups}: expected at least one group, and "
            "a share from 0 to 1/groups.",
            "minimum_share",
            "groups",
        )


def group_spread(scores: Tensor, prompts: Tensor, assignments: Tensor, objective: str) -> float:
    """The spread of group means that a partition reaches, averaged over prompts by size."""
    return soft_spread(scores, prompts, one_hot(assignments), objective)


def soft_spread(scores: Tensor, prompts: Tensor, memberships: Tensor, objective: str) -> float:
    """The same for memberships ``[N, G]``, whose rows sum to 1."""
    total = 0.0
    for prompt in prompts.unique().tolist():
        chosen = prompts == prompt
        values, members = scores[chosen].double(), memberships[chosen].double()
        masses, sums = members.sum(0), members.T @ values
        means = sums[masses > 0] / masses[masses > 0]
        if objective == "between":
            deviations = (means - values.mean()).square()
            spread = (masses[masses > 0] * deviations).sum() / len(values)
        else:
            spread = means.std(unbiased=False)
        total += float(spread) * len(values) / len(scores)
    return total


def _best_cuts(values: Tensor, groups: int, least: int, objective: str) -> list[int]:
    """Positions at which to cut ascending values, each piece of at least ``least``."""
    if objective == "std":
        sizes = torch.arange(least, len(values) - least + 1, dtype=torch.float64)
        sums = values.cumsum(0)[least - 1 : len(values) - least]
        gaps = (values.sum() - sums) / (len(values) - sizes) - sums / sizes
        return [] if groups == 1 else [least + int(gaps.argmax())]
    sums = torch.cat([values.new_zeros(1), (values - values.mean()).cumsum(0)])
    # gain[k]: best sum over pieces of (sum of piece)^2 / size, for the first k values.
    ends = torch.arange(len(values) + 1)
    gain = torch.where(ends >= least, sums.square() / ends.clamp(min=1), -torch.inf)
    choices: list[Tensor] = []
    for piece in range(2, groups + 1):
        gain, choice = _add_piece(gain, sums, least, (piece - 1) * least)
        choices.append(choice)
    cuts: list[int] = []
    end = len(values)
    for choice in reversed(choices):
        end = int(choice[end])
        cuts.append(end)
    return cuts[::-1]


def _add_piece(gain: Tensor, sums: Tensor, least: int, first: int) -> tuple[Tensor, Tensor]:
    """One more piece at the end, for every number of values.

    The best start of the last piece does not decrease with its end, so all ends are solved by
    divide and conquer, a level at a time: O(N log N) work, O(N) memory.

    Args:
        gain: best values with one piece fewer, ``[N + 1]``.
        sums: of the first k values.
        least: size of a piece at least.
        first: earliest start of the last piece.

    Returns:
        best values and the starts that reach them, both ``[N + 1]``.
    """
    count = len(gain)
    best = torch.full_like(gain, -torch.inf)
    start = torch.zeros(count, dtype=torch.int64)
    low_end = torch.tensor([first + least])
    high_end = torch.tensor([count - 1])
    low_start, high_start = torch.tensor([first]), torch.tensor([count - 1 - least])
    while len(low_end):
        middle = (low_end + high_end) // 2
        last = torch.minimum(high_start, middle - least)
        widths = (last - low_start + 1).clamp(min=1)
        segment = torch.repeat_interleave(torch.arange(len(middle)), widths)
        offsets = widths.cumsum(0) - widths
        starts = torch.arange(int(widths.sum())) - offsets[segment] + low_start[segment]
        sizes = middle[segment] - starts
        value = gain[starts] + (sums[middle[segment]] - sums[starts]).square() / sizes
        peak = torch.full((len(middle),), -torch.inf, dtype=value.dtype)
        peak = peak.scatter_reduce(0, segment, value, "amax")
        where = torch.where(value == peak[segment], starts, count)
        chosen = torch.full((len(middle),), count).scatter_reduce(0, segment, where, "amin")
        best[middle], start[middle] = peak, chosen
        left, right = low_end < middle, middle < high_end
        low_end, high_end, low_start, high_start = (
            torch.cat([low_end[left], middle[right] + 1]),
            torch.cat([middle[left] - 1, high_end[right]]),
            torch.cat([low_start[left], chosen[right]]),
            torch.cat([chosen[left], high_start[right]]),
        )
    return best, start
