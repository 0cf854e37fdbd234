"""Means by prompt, and cutting values in two: where, and how clearly they fall into groups."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Share of its variance that the best cut of a normal distribution explains, 2 / pi.
NORMAL_SHARE = 2 / torch.pi


def prompt_means(values: Tensor, prompts: Tensor) -> Tensor:
    """Means over the images of each prompt, ``[P, ...]``; 0 for a prompt without images.

    Args:
        values: ``[N, ...]``.
        prompts: int64 ``[N]``.
    """
    counts = prompts.bincount().clamp(min=1)
    sums = values.new_zeros((len(counts), *values.shape[1:])).index_add(0, prompts, values)
    return sums / counts.reshape(-1, *[1] * (values.dim() - 1))


class Cut(NamedTuple):
    """The best cut in two of each column, by variance explained (two-means).

    Attributes:
        share: of the variance that the cut explains, float64 ``[...]`` in [0, 1]: about 0.64 for
            normal values, towards 1 the more clearly there are two groups; 0 where the values do
            not vary.
        threshold: values above it are the upper group, float64 ``[...]``.
        upper: share of the values in the upper group, float64 ``[...]``.
    """

    share: Tensor
    threshold: Tensor
    upper: Tensor


def two_means(values: Tensor) -> Cut:
    """The best cut of each column into two groups, exactly, by sorting.

    Args:
        values: ``[n, ...]``; each column is cut by itself.
    """
    count = len(values)
    if count < 2:
        nothing = values.new_zeros(values.shape[1:], dtype=torch.float64)
        return Cut(nothing, nothing, nothing)
    # numpy sorts rows an order of magnitude faster than torch sorts columns.
    columns = values.double().reshape(count, -1).T
    ordered = torch.from_numpy(np.sort(columns.numpy(), axis=1))
    centred = ordered - ordered.mean(1, keepdim=True)
    below = centred.cumsum(1)[:, :-1]
    sizes = torch.arange(1, count, dtype=torch.float64)
    between = below.square() * count / (sizes * (count - sizes))
    best, where = between.max(1)
    total = centred.square().sum(1)
    share = best / total.clamp(min=torch.finfo(torch.float64).tiny)
    edges = ordered.gather(1, torch.stack([where, where + 1], dim=1))
    cut = Cut(
        share=torch.where(total > 1e-12, share, 0.0),
        threshold=edges.mean(1),
        upper=1 - (where + 1).double() / count,
    )
    return Cut(*(column.reshape(values.shape[1:]) for column in cut))


def cut_by_prompt(values: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """The best cut of each prompt's values, by column.

    Args:
        values: ``[N, ...]``.
        prompts: int64 ``[N]``.

    Returns:
        which images lie above their prompt's cut, bool of the shape of the values; and the share of
        variance that the cut explains in each prompt that has images, in order, float64
        ``[P, ...]``.
    """
    upper = torch.zeros_like(values, dtype=torch.bool)
    shares = []
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        cut = two_means(values[rows])
        upper[rows] = values[rows] > cut.threshold
        shares.append(cut.share)
    return upper, torch.stack(shares)


def upper_groups(values: Tensor, prompts: Tensor) -> Tensor:
    """Which images lie above the best cut of their prompt's values, see :func:`cut_by_prompt`."""
    return cut_by_prompt(values, prompts)[0]


def two_means_share(values: Tensor) -> Tensor:
    """Share of the variance that the best cut into two groups explains, see :class:`Cut`."""
    return two_means(values).share
