"""Directions of readings along which prompts differ in shape: found, sharpened, measured."""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.diffusion.draws import generator
from invdiff_pl.environments.cuts import cut_by_prompt, grouping, prompt_means, upper_groups
from invdiff_pl.environments.mixture import fit_mixture, mixture_gains

# Random directions to start from, by the power of the share that a cut explains beside the spread
# of skewness in what is climbed. Without it a minority of a few percent is found most surely, with
# it groups of more even size.
STARTS = {0.0: 64, 4.0: 160}
# Steps of the climb, and the first of their lengths; they shrink to nothing.
CLIMBS = 120
FIRST_STEP = 0.1
# Directions of less than this share of the largest standard deviation are noise.
LEAST_DEVIATION = 1e-3
SHARPENINGS = 4
# Candidates that the other half of the images chooses from.
SHORTLIST = 60
# Scores that correlate more than this are the same direction.
SAME = 0.9
# The share of images whose prompts may be less clear than the clarity told: in a prompt of few
# images a minority of a few percent is too small to be cut off clearly.
UNCLEAR_IMAGES = 0.3
# How much more a direction counts whose groups differ in the same way in all prompts.
ALIGNED = 3.0


@dataclass(frozen=True)
class Direction:
    """A direction of the readings.

    Attributes:
        weights: float64 ``[D]``; the scores are ``(table - prompt means) @ weights``.
        clarity: of the groups by the best cut, see :class:`~invdiff_pl.environments.cuts.Cut`, in
            the less clear prompts; above 0 if there are groups.
        gain: in log-likelihood an image, of a mixture of two groups over one, in the less clear
            prompts.
        likelihood_ratio: twice the gain in log-likelihood of a mixture in prompts' own
            proportions over one in equal proportions.
        alignment: mean cosine, over pairs of prompts, of what tells the groups apart in all white
            readings; towards 1 if it is the same in all prompts.
    """

    weights: Tensor
    clarity: float
    gain: float
    likelihood_ratio: float
    alignment: float

    @property
    def evidence(self) -> float:
        """What directions are ranked by; 0 if clarity, gain or likelihood ratio are not positive.

        Clear groups in every prompt, by clarity and gain: shapes also differ by what only one
        prompt's images vary in. The likelihood ratio grows with the number of images, and with
        shapes that no groups explain: it counts by its fourth root. Groups that are aligned count
        more; that they are not speaks against little, since an attribute may look different along
        with what the prompts name.
        """
        if min(self.clarity, self.gain, self.likelihood_ratio) <= 0:
            return 0.0
        shown = self.clarity * self.gain * self.likelihood_ratio**0.25
        return shown * (1 + ALIGNED * max(self.alignment, 0.0))


def candidates(
    values: Tensor, prompts: Tensor, seed: int, suggestions: Tensor | None = None
) -> Tensor | None:
    """Directions along which prompts differ in shape, no two alike.

    Args:
        values: readings ``[N, D]``.
        prompts: int64 ``[N]``.
        seed: of the starting directions.
        suggestions: other scores ``[N, S]``, whose groups are tried too, see :func:`suggested`.

    Returns:
        weights float64 ``[D, C]`` of at most :data:`SHORTLIST` of them, and those suggested;
        ``None`` with fewer than two prompts or readings that do not vary.
    """
    prompts = prompts.unique(return_inverse=True)[1]
    values = values - prompt_means(values, prompts)[prompts]
    whitening = whitening_of(values)
    if int(prompts.max()) < 1 or whitening.shape[1] == 0:
        return None
    readings = values @ whitening
    source = generator(seed, "directions")
    climbed = []
    for power, count in STARTS.items():
        start = torch.randn(readings.shape[1], count, generator=source, dtype=torch.float64)
        climbed.append(_climb(readings, prompts, start, power))
    directions = sharpen(readings, torch.cat(climbed, dim=1), prompts)
    scores = readings @ directions
    order = skew_spread(scores, prompts).argsort(descending=True)
    kept = directions[:, order[_distinct(scores[:, order])[:SHORTLIST]]]
    if suggestions is not None:
        start = suggested(readings, prompts, suggestions)
        kept = torch.cat([kept, sharpen(readings, start, prompts)], dim=1)
    return whitening @ kept


def suggested(readings: Tensor, prompts: Tensor, scores: Tensor) -> Tensor:
    """Directions that tell the groups of other scores, whichever way those point in a prompt.

    What is unusual for one prompt may be usual for another. So each prompt's groups have a
    direction of their own, and these are turned to agree with their leading common axis, by how
    clear the groups are.

    Args:
        readings: white ``[N, K]``.
        prompts: int64 ``[N]``, without gaps.
        scores: ``[N, S]``.

    Returns:
        float64 ``[K, S]``.
    """
    weights = (prompts.bincount() / len(prompts)).double()
    columns = []
    for column in grouping(scores, prompts).T:
        # [P, K]: covariances of the readings with the groups, by prompt.
        own = prompt_means(readings * column[:, None], prompts) * weights[:, None]
        axis = torch.linalg.svd(own, full_matrices=False).Vh[0]
        columns.append(torch.where(own @ axis < 0, -1.0, 1.0).double() @ own)
    return torch.stack(columns, dim=1)


def measured(values: Tensor, prompts: Tensor, weights: Tensor) -> list[Direction]:
    """The directions with their figures on these images."""
    prompts = prompts.unique(return_inverse=True)[1]
    scores = values @ weights
    scores = scores - prompt_means(scores, prompts)[prompts]
    upper, clarity = cut_by_prompt(scores, prompts)
    groups = upper.double()
    start = torch.stack([1 - groups, groups], dim=2)
    figures = (
        less_clear(clarity, prompts),
        less_clear(mixture_gains(scores, prompts, start), prompts),
        likelihood_ratios(scores, prompts, start),
        alignments(values, prompts, groups),
    )
    return [
        Direction(column, *map(float, told))
        for column, *told in zip(weights.T, *figures, strict=True)
    ]


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


def likelihood_ratios(scores: Tensor, prompts: Tensor, start: Tensor) -> Tensor:
    """Twice the gain of prompts' own shares over equal ones in a mixture of two, ``[C]``."""
    own = fit_mixture(scores, prompts, start)
    equal = fit_mixture(scores, prompts, start, equal_shares=True)
    return 2 * (own.log_likelihood - equal.log_likelihood)


def alignments(values: Tensor, prompts: Tensor, groups: Tensor) -> Tensor:
    """Whether groups differ in the same way in all prompts.

    An attribute of all prompts' images changes the readings alike in each, unless it looks
    different along with what a prompt names. Two attributes, of one prompt's images each, may show
    along one direction, but differ in the others.

    Args:
        values: readings ``[N, D]``.
        prompts: int64 ``[N]``, without gaps.
        groups: 0 or 1, float64 ``[N, C]``.

    Returns:
        float64 ``[C]``: mean cosine between the prompts' covariances of white readings with the
        groups, over pairs of prompts, weighted by their norms.
    """
    values = values - prompt_means(values, prompts)[prompts]
    readings = values @ whitening_of(values)
    centred = groups - prompt_means(groups, prompts)[prompts]
    total = readings.T @ centred
    norms, squares = torch.zeros(2, groups.shape[1], dtype=torch.float64)
    for prompt in prompts.unique().tolist():
        rows = prompts == prompt
        lengths = (readings[rows].T @ centred[rows]).norm(dim=0)
        norms, squares = norms + lengths, squares + lengths.square()
    pairs = (norms.square() - squares).clamp(min=torch.finfo(torch.float64).tiny)
    return (total.square().sum(0) - squares) / pairs


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


def _climb(readings: Tensor, prompts: Tensor, start: Tensor, share_power: float) -> Tensor:
    """Unit directions ``[K, C]`` of locally largest skewness spread times a power of the share."""
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
            if share_power > 0:
                climbed = climbed + share_power * _log_share(scores, prompts)
            (-climbed.sum()).backward()
            optimizer.step()
            schedule.step()
    return (free / free.norm(dim=0)).detach().double()


def _log_share(scores: Tensor, prompts: Tensor) -> Tensor:
    """Logarithm of the share that the best cut explains, averaged over images, ``[C]``.

    The cut changes by whole images only, so it is held fixed in the gradient.

    Args:
        scores: ``[N, C]``, of mean 0 in every prompt.
        prompts: int64 ``[N]``, without gaps.
    """
    upper = upper_groups(scores.detach(), prompts).to(scores)
    above, part = prompt_means(upper * scores, prompts), prompt_means(upper, prompts)
    variance = (part * (1 - part) * prompt_means(scores.square(), prompts)).clamp(min=1e-12)
    shares = (above.square() / variance).clamp(min=1e-6)
    counts = prompts.bincount().to(scores)
    return counts / len(scores) @ shares.log()


def sharpen(
    readings: Tensor, directions: Tensor, prompts: Tensor, rounds: int = SHARPENINGS
) -> Tensor:
    """Cut each prompt's scores in two and take the pooled discriminant of the parts, in turn.

    The readings are white, so Fisher's discriminant is their covariance with the parts; prompts
    count by how clear theirs are.
    """
    for _ in range(rounds):
        directions = readings.T @ grouping(readings @ directions, prompts)
        directions = directions / directions.norm(dim=0).clamp(min=1e-12)
    return directions


def less_clear(figures: Tensor, prompts: Tensor) -> Tensor:
    """The figure ``[P, C]`` that prompts of :data:`UNCLEAR_IMAGES` do not exceed, ``[C]``."""
    ordered, order = figures.sort(dim=0)
    sizes = prompts.bincount().double() / len(prompts)
    reached = sizes[order].cumsum(0) >= UNCLEAR_IMAGES
    return ordered.gather(0, reached.int().argmax(0)[None])[0]


def _distinct(scores: Tensor) -> Tensor:
    """Numbers of columns that correlate with no earlier kept one more than :data:`SAME`."""
    alike = (torch.corrcoef(scores.T).abs().reshape([scores.shape[1]] * 2) > SAME).tolist()
    kept: list[int] = []
    for column in range(scores.shape[1]):
        if not any(alike[column][other] for other in kept):
            kept.append(column)
    return torch.tensor(kept, dtype=torch.int64)
