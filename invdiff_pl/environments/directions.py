"""Directions of readings along which prompts differ in shape: found and sharpened."""

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.environments.cuts import (
    TWO_MEANS,
    UNEVEN,
    CutRule,
    cut_by_prompt,
    grouping,
    prompt_means,
)

# Random directions to start from: those that climb the spread of skewness alone find a minority of
# a few percent most surely, those that climb it times a power of the share that a cut explains find
# groups of more even size.
LEANING_STARTS = 64
GROUPED_STARTS = 160
SHARE_POWER = 4.0
# Steps of the climb, and the first of their lengths; they shrink to nothing.
CLIMBS = 120
FIRST_STEP = 0.1
# Directions of less than this share of the largest standard deviation are noise.
LEAST_DEVIATION = 1e-3
SHARPENINGS = 4
# Rules that candidates are climbed and sharpened by, side by side. Two-means misses groups of a few
# percent; the other loses groups of more even size to smaller and clearer ones of some prompts.
RULES = (TWO_MEANS, UNEVEN)
# Candidates by each rule, beside those suggested, that the other half of the images chooses from.
SHORTLIST = 60
# Scores that correlate more than this are the same direction.
SAME = 0.9


def candidates(
    values: Tensor, prompts: Tensor, seed: int, suggestions: Tensor | None = None
) -> Tensor | None:
    """Directions along which prompts differ in shape, no two of a rule alike; and those suggested.

    Args:
        values: readings ``[N, D]``.
        prompts: int64 ``[N]``.
        seed: of the starting directions.
        suggestions: other scores ``[N, S]``, whose groups are tried too, see :func:`suggested`.

    Returns:
        weights float64 ``[D, C]`` of at most :data:`SHORTLIST` of them by each of :data:`RULES`,
        and those suggested; ``None`` with fewer than two prompts or readings that do not vary.
    """
    prompts = prompts.unique(return_inverse=True)[1]
    values = values - prompt_means(values, prompts)[prompts]
    whitening = whitening_of(values)
    if int(prompts.max()) < 1 or whitening.shape[1] == 0:
        return None
    readings = values @ whitening
    source = generator(seed, "directions")
    leaning, grouped = (
        torch.randn(readings.shape[1], count, generator=source, dtype=torch.float64)
        for count in (LEANING_STARTS, GROUPED_STARTS)
    )
    leaned = _climb(readings, prompts, leaning)
    kept = []
    for rule in RULES:
        climbed = [leaned, _climb(readings, prompts, grouped, rule)]
        directions = sharpen(readings, torch.cat(climbed, dim=1), prompts, rule)
        scores = readings @ directions
        order = skew_spread(scores, prompts).argsort(descending=True)
        kept.append(directions[:, order[distinct(scores[:, order])[:SHORTLIST]]])
        if suggestions is not None:
            start = suggested(readings, prompts, suggestions, rule)
            kept.append(sharpen(readings, start, prompts, rule))
    found = torch.cat(kept, dim=1)
    return whitening @ found[:, found.norm(dim=0) > 0]  # suggestions may not vary


def suggested(readings: Tensor, prompts: Tensor, scores: Tensor, rule: CutRule = UNEVEN) -> Tensor:
    """Directions that tell the groups of other scores, whichever way those point in a prompt.

    What is unusual for one prompt may be usual for another. So each prompt's groups have a
    direction of their own, and these are turned to agree with their leading common axis.

    Args:
        readings: white ``[N, K]``.
        prompts: int64 ``[N]``, without gaps.
        scores: ``[N, S]``.
        rule: that their groups are cut by.

    Returns:
        float64 ``[K, S]``.
    """
    weights = (prompts.bincount() / len(prompts)).double()
    columns = []
    for column in grouping(scores, prompts, rule).T:
        # [P, K]: covariances of the readings with the groups, by prompt.
        own = prompt_means(readings * column[:, None], prompts) * weights[:, None]
        axis = torch.linalg.svd(own, full_matrices=False).Vh[0]
        columns.append(torch.where(own @ axis < 0, -1.0, 1.0).double() @ own)
    return torch.stack(columns, dim=1)


def skew_spread(scores: Tensor, prompts: Tensor) -> Tensor:
    """How differently the prompts' scores lean to one side, by column.

    Args:
        scores: ``[N, C]``, of mean 0 in every prompt.
        prompts: int64 ``[N]``, without gaps.

    Returns:
        float64 ``[C]``: standard deviation over prompts, weighted by size, of the mean of
        ``tanh(score / deviation)``.
    """
    counts = prompts.bincount().double()
    variances = prompt_means(scores.square(), prompts)
    leaning = prompt_means(torch.tanh(scores / variances.clamp(min=1e-12).sqrt()[prompts]), prompts)
    weights = (counts / counts.sum())[:, None]
    mean = (weights * leaning).sum(0)
    return ((leaning - mean).square() * weights).sum(0).clamp(min=1e-16).sqrt()


def whitening_of(values: Tensor, ridge: float = 0.0) -> Tensor:
    """``W [D, K]`` that turns centred values into uncorrelated readings of unit variance.

    ``W W^T`` times a difference of two groups' means is Fisher's discriminant, with the ridge on
    the covariance: that it is of all values instead of those within the groups changes its length
    only.
    """
    covariance = values.T @ values / len(values)
    covariance.diagonal().add_(ridge)
    variances, axes = torch.linalg.eigh(covariance)
    kept = variances > LEAST_DEVIATION**2 * variances.max().clamp(min=1e-12)
    return axes[:, kept] / variances[kept].sqrt()


def _climb(readings: Tensor, prompts: Tensor, start: Tensor, rule: CutRule | None = None) -> Tensor:
    """Unit directions ``[K, C]`` of locally largest skewness spread, by itself without a rule.

    With one, times a power of the share that its cut explains.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Copies: tensors made under inference mode cannot be differentiated through. Single
        # precision is enough for where to sharpen from.
        readings, prompts = readings.float(), prompts.clone()
        free = (start / start.norm(dim=0)).float().requires_grad_(True)
        # Adam, whose steps in one column do not depend on the others.
        optimizer = torch.optim.Adam([free], lr=FIRST_STEP)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CLIMBS)
        for _ in range(CLIMBS):
            optimizer.zero_grad()
            scores = readings @ (free / free.norm(dim=0))
            climbed = skew_spread(scores, prompts).log()
            if rule is not None:
                climbed = climbed + SHARE_POWER * _log_share(scores, prompts, rule)
            (-climbed.sum()).backward()
            optimizer.step()
            schedule.step()
    return (free / free.norm(dim=0)).detach().double()


def _log_share(scores: Tensor, prompts: Tensor, rule: CutRule) -> Tensor:
    """Logarithm of the share that the best cut explains, averaged over images, ``[C]``.

    The cut changes by whole images only, so it is held fixed in the gradient.

    Args:
        scores: ``[N, C]``, of mean 0 in every prompt.
        prompts: int64 ``[N]``, without gaps.
        rule: of the cut.
    """
    upper = cut_by_prompt(scores.detach(), prompts, rule)[0].to(scores)
    above, part = prompt_means(upper * scores, prompts), prompt_means(upper, prompts)
    variance = (part * (1 - part) * prompt_means(scores.square(), prompts)).clamp(min=1e-12)
    shares = (above.square() / variance).clamp(min=1e-6)
    counts = prompts.bincount().to(scores)
    return counts / len(scores) @ shares.log()


def sharpen(
    readings: Tensor,
    directions: Tensor,
    prompts: Tensor,
    rule: CutRule = UNEVEN,
    rounds: int = SHARPENINGS,
) -> Tensor:
    """Cut each prompt's scores in two and take the pooled discriminant of the parts, in turn.

    The readings are white, so Fisher's discriminant is their covariance with the parts.
    """
    for _ in range(rounds):
        directions = readings.T @ grouping(readings @ directions, prompts, rule)
        directions = directions / directions.norm(dim=0).clamp(min=1e-12)
    return directions


def distinct(scores: Tensor) -> Tensor:
    """Numbers of columns that correlate with no earlier kept one more than :data:`SAME`."""
    alike = (torch.corrcoef(scores.T).abs().reshape([scores.shape[1]] * 2) > SAME).tolist()
    kept: list[int] = []
    for column in range(scores.shape[1]):
        if not any(alike[column][other] for other in kept):
            kept.append(column)
    return torch.tensor(kept, dtype=torch.int64)
