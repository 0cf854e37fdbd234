"""Means by prompt, and cutting values in two: where, and how clearly they fall into groups."""

from math import pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class CutRule(NamedTuple):
    """How values are cut in two, and what prompts' groups count.

    Attributes:
        entropy_weight: how much the entropy of the groups' shares counts against a cut, see
            :func:`best_cut`. With none a few images far from all others are not cut off: there is
            more variance to explain by halving the others. With 1, as in the likelihood of two
            groups, a cut would take the outermost values off a normal distribution; up to 0.73 it
            goes through the middle of one.
        by_clarity: whether prompts count by how clear their groups are, see :func:`grouping`, or
            all alike.
    """

    entropy_weight: float
    by_clarity: bool


TWO_MEANS = CutRule(entropy_weight=0.0, by_clarity=False)
UNEVEN = CutRule(entropy_weight=0.5, by_clarity=True)
# A prompt without groups counts as if it gained this in a direction that prompts share.
LEAST_GAINED = 0.02
# So do prompts of fewer images: these fall into groups by chance, two of them always.
LEAST_COUNTED = 20


def prompt_means(values: Tensor, prompts: Tensor) -> Tensor:
    """Means over the images of each prompt, ``[P, ...]``; 0 for a prompt without images.

    Args:
        values: ``[N, ...]``.
        prompts: int64 ``[N]``.
    """
    counts = prompts.bincount().clamp(min=1)
    sums = values.new_zeros((len(counts), *values.shape[1:])).index_add(0, prompts, values)
    return sums / counts.reshape(-1, *[1] * (values.dim() - 1))


def cells_of(prompts: Tensor, values: Tensor) -> Tensor:
    """Numbers without gaps of the pairs of prompt and attribute value, int64 ``[N]``."""
    return torch.stack([prompts, values]).unique(dim=1, return_inverse=True)[1]


class Cut(NamedTuple):
    """The best cut in two of each column.

    Attributes:
        clarity: how clearly the values fall into two groups, float64 ``[...]``: by which part the
            cut leaves less unexplained than one through the middle of normal values does, see
            :func:`best_cut`. About 0 for these, towards 1 the more clearly there are two groups, of
            any size; 0 where the values do not vary.
        share: of the variance that the cut explains, float64 ``[...]`` in [0, 1].
        threshold: values above it are the upper group, float64 ``[...]``.
        upper: share of the values in the upper group, float64 ``[...]``.
    """

    clarity: Tensor
    share: Tensor
    threshold: Tensor
    upper: Tensor


def best_cut(values: Tensor, entropy_weight: float = UNEVEN.entropy_weight) -> Cut:
    """The best cut of each column into two groups, exactly, by sorting.

    By the classification likelihood of two normal groups of the same variance and of their own
    shares ``p`` (Symons 1981), with a weight on the term of the shares: what is left unexplained,
    ``(1 - share of variance explained) exp(2 entropy_weight H(p))``, is smallest.

    Args:
        values: ``[n, ...]``; each column is cut by itself.
        entropy_weight: from 0, two-means, to 1, the whole likelihood.
    """
    count = len(values)
    if count < 2:
        nothing = values.new_zeros(values.shape[1:], dtype=torch.float64)
        return Cut(nothing, nothing, nothing, nothing)
    # numpy sorts rows an order of magnitude faster than torch sorts columns.
    columns = values.double().reshape(count, -1).T
    ordered = torch.from_numpy(np.sort(columns.numpy(), axis=1))
    centred = ordered - ordered.mean(1, keepdim=True)
    below = centred.cumsum(1)[:, :-1]
    sizes = torch.arange(1, count, dtype=torch.float64)
    total = centred.square().sum(1)
    varying = total > 1e-12
    tiny = torch.finfo(torch.float64).tiny
    shares = below.square() * count / (sizes * (count - sizes)) / total.clamp(min=tiny)[:, None]
    part = sizes / count
    entropy = -(part * part.log() + (1 - part) * (1 - part).log())
    unexplained = (1 - shares).clamp(min=0) * (2 * entropy_weight * entropy).exp()
    least, where = unexplained.min(1)
    edges = ordered.gather(1, torch.stack([where, where + 1], dim=1))
    # The cut through the middle of a normal distribution explains 2 / pi.
    normal_unexplained = (1 - 2 / pi) * 2 ** (2 * entropy_weight)
    cut = Cut(
        clarity=torch.where(varying, 1 - least / normal_unexplained, 0.0),
        share=torch.where(varying, shares.gather(1, where[:, None])[:, 0], 0.0),
        threshold=edges.mean(1),
        upper=1 - (where + 1).double() / count,
    )
    return Cut(*(column.reshape(values.shape[1:]) for column in cut))


def cut_by_prompt(values: Tensor, prompts: Tensor, rule: CutRule = UNEVEN) -> tuple[Tensor, Tensor]:
    """The best cut of each prompt's values, by column.

    Args:
        values: ``[N, ...]``.
        prompts: int64 ``[N]``.
        rule: of the cut.

    Returns:
        which images lie above their prompt's cut, bool of the shape of the values; and the clarity
        of each prompt's groups, float64 ``[P, ...]``, 0 for a prompt without images.
    """
    upper = torch.zeros_like(values, dtype=torch.bool)
    clarity = values.new_zeros((int(prompts.max()) + 1, *values.shape[1:]), dtype=torch.float64)
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        cut = best_cut(values[rows], rule.entropy_weight)
        upper[rows] = values[rows] > cut.threshold
        clarity[prompt] = cut.clarity
    return upper, clarity


def upper_groups(values: Tensor, prompts: Tensor) -> Tensor:
    """Which images lie above the best cut of their prompt's values, see :func:`cut_by_prompt`."""
    return cut_by_prompt(values, prompts)[0]


def grouping(values: Tensor, prompts: Tensor, rule: CutRule = UNEVEN) -> Tensor:
    """Groups of each prompt's values, of mean 0 and, by the rule, weighed by how clear they are.

    Where a prompt's values do not fall into groups a cut goes through their middle: as many images
    on either side, of no meaning. That must not outweigh the few that another prompt sets apart.

    Args:
        values: ``[N, C]``.
        prompts: int64 ``[N]``.
        rule: of the cut and the weights.

    Returns:
        float64 ``[N, C]``: 1 above the best cut, 0 below, less the prompt's mean; weighed, times
        what the cut gains in log-likelihood an image, ``-log(1 - clarity) / 2``, at least
        :data:`LEAST_GAINED`, and no more in a prompt of fewer than :data:`LEAST_COUNTED` images.
    """
    upper, clarity = cut_by_prompt(values, prompts, rule)
    groups = upper.double()
    centred = groups - prompt_means(groups, prompts)[prompts]
    if not rule.by_clarity:
        return centred
    gained = -0.5 * (1 - clarity).clamp(min=torch.finfo(torch.float64).eps).log()
    few = prompts.bincount()[:, None] < LEAST_COUNTED
    weights = gained.clamp(min=LEAST_GAINED).masked_fill(few, LEAST_GAINED)
    return centred * weights[prompts]
