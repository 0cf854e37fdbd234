"""Sharper scores from cruder ones: cut in two, and project on what tells the parts apart."""

import torch
from torch import Tensor

from invdiff_pl.environments.cuts import two_means, two_means_share
from invdiff_pl.environments.partition import partition

# Rounds of cutting and projecting, and the ridge against unit variance.
REFINEMENTS = 4
RIDGE = 0.1
# What a projection must explain by one cut to be trusted; normal values reach 0.64.
CLEAR_SHARE = 0.68


def refine(table: Tensor, scores: Tensor, prompts: Tensor) -> Tensor:
    """Cut each prompt's scores in two and take the :func:`discriminant` of the parts, in turn.

    Args:
        table: float64 ``[N, D]``, of about unit variance.
        scores: float64 ``[N]`` to start from.
        prompts: int64 ``[N]``.

    Returns:
        float64 ``[N]``.
    """
    for _ in range(REFINEMENTS):
        scores = discriminant(table, scores, prompts, partition(scores, prompts).assignments)
    return scores


def discriminant(table: Tensor, scores: Tensor, prompts: Tensor, assignments: Tensor) -> Tensor:
    """Project each prompt's images on the direction that tells its two environments apart best.

    Fisher's linear discriminant with a ridge, standardised within the prompt. A prompt keeps its
    scores if it has too few images for a covariance, or if the projection does not fall into two
    groups more clearly than they do and than a normal distribution does: a cut through the middle
    of one group must not be made the ground of the next.

    Args:
        table: float64 ``[N, D]``, of about unit variance.
        scores: float64 ``[N]``.
        prompts: int64 ``[N]``.
        assignments: int64 ``[N]``, 0 or 1.

    Returns:
        float64 ``[N]``; environment 1 lies above environment 0.
    """
    refined = scores.clone()
    width = table.shape[1]
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        values, upper = table[rows], assignments[rows] == 1
        if len(rows) < 5 * width or upper.sum() < 2 or (~upper).sum() < 2:
            continue
        means = values[~upper].mean(0), values[upper].mean(0)
        residuals = values - torch.where(upper[:, None], means[1], means[0])
        covariance = residuals.T @ residuals / len(rows)
        ridge = RIDGE * torch.eye(width, dtype=table.dtype)
        projected = values @ torch.linalg.solve(covariance + ridge, means[1] - means[0])
        if two_means_share(projected) > max(CLEAR_SHARE, float(two_means_share(scores[rows]))):
            refined[rows] = (projected - projected.mean()) / projected.std()
    return refined


def by_group(scores: Tensor, prompts: Tensor) -> Tensor:
    """Scores shifted, scaled and turned so that all prompts can be compared.

    Returns:
        float64 ``[N]``: of each prompt's two groups (by the best cut) the larger has mean 0, the
        smaller mean 1. 0 where a prompt's scores do not vary.
    """
    turned = torch.zeros_like(scores, dtype=torch.float64)
    for prompt in prompts.unique().tolist():
        rows = prompts == prompt
        values = scores[rows].double()
        cut = two_means(values)
        if cut.share == 0:
            continue
        above = values > cut.threshold
        large, small = values[~above].mean(), values[above].mean()
        if cut.upper > 0.5:
            large, small = small, large
        turned[rows] = (values - large) / (small - large)
    return turned
