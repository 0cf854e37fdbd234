"""What counts for a hidden attribute: clear, shared, informative, aligned.

The terms are those of :mod:`invdiff_pl.environments.hidden_attribute`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from invdiff_pl.backbones.draws import generator
from invdiff_pl.environments.cross_reading import cross_read_shares
from invdiff_pl.environments.lines import Lines
from invdiff_pl.environments.shared_values import (
    Fit,
    fit_values,
    gains,
    kmeans_memberships,
    log_likelihood_ratio,
)
from invdiff_pl.environments.space import Space, prompt_means
from invdiff_pl.environments.two_values import two_value_fits

# Prompts with fewer images are judged together, in parts of at least as many images.
PART_IMAGES = 50
_MOST_PARTS = 20
# Rounds in which a part refits its groups alone: enough to leave a direction that is not its own.
_ALONE_ROUNDS = 10
# Rotations are drawn until this many are as aligned (Besag and Clifford, Biometrika 78, 1991), or
# there are as many as this, or as a p-value of half the level takes.
_AS_ALIGNED, _ROTATIONS, _ROTATIONS_TOGETHER = 20, 1998, 111
# Components that many values are looked for in: among more, distances hardly tell clusters.
_CLUSTERED = 20
# Cosine from which on two attributes of two values are one.
_SAME_ATTRIBUTE = 0.5


@dataclass(frozen=True)
class Judged:
    """A fit and what counts for it.

    Attributes:
        fit: of two or more values.
        gain: log-likelihood an image of the groups over one, in the less clear parts.
        shared: whether (nearly) all parts have all of its values.
        sought: number of values that were looked for.
        ratio: twice the log-likelihood of own over equal shares.
        evidence: what of it chance does not explain, in nats an image.
        alignment: cosine of the parts' differences between groups.
        p_alignment: how often that of unrelated parts is as large.
        difference: between prompts' shares, by their own images and by what the other parts tell,
            whichever is less.
    """

    fit: Fit
    gain: float
    shared: bool
    sought: int
    ratio: float
    evidence: float
    alignment: float = 0.0
    p_alignment: float = 1.0
    difference: float = 0.0

    @property
    def values(self) -> int:
        """Number of values."""
        return len(self.fit.delta)

    @property
    def possible(self) -> bool:
        """Whether it may be an attribute that prompts share."""
        return self.gain > 0 and self.shared

    def is_aligned(self, level: float) -> bool:
        """Whether it may be an attribute that prompts share, aligned at a level."""
        return self.possible and self.p_alignment <= level

    @property
    def explained(self) -> float:
        """Log-likelihood, and the statistic that says how uneven it is, both an image.

        The latter counts as far as the other parts confirm that shares differ.
        """
        likelihood, own = self.fit.log_likelihood, difference_of(self.fit.shares)
        confirmed = self.difference / own if own > 0 else 0.0
        return float(likelihood.mean()) + confirmed * self.ratio / len(likelihood)

    @property
    def strength(self) -> float:
        """How clear times how uneven.

        Naming one of K values takes log K nats, so more values should gain more; and chance adds
        more to a ratio of many shares.
        """
        clear = max(self.gain, 0.0) / math.log(self.values)
        uneven = 2 * len(self.fit.memberships) * self.evidence
        return clear * uneven**0.5


def parts_of(prompts: Tensor) -> Tensor:
    """Parts of the images that judge by themselves, int64 ``[N]``: prompts, small ones together."""
    counts = prompts.bincount()
    least = max(PART_IMAGES, -(-len(prompts) // _MOST_PARTS))
    part, filled = 0, 0
    part_of = torch.zeros_like(counts)
    for prompt, count in enumerate(counts.tolist()):
        part_of[prompt] = part
        filled += count
        if filled >= least or count >= PART_IMAGES:
            part, filled = part + 1, 0
    if 0 < filled < PART_IMAGES and part > 0:
        part_of[part_of == part] = part - 1
    return part_of[prompts].unique(return_inverse=True)[1]


def are_small(prompts: Tensor) -> bool:
    """Whether prompts have few images each."""
    return len(prompts) / (int(prompts.max()) + 1) < PART_IMAGES


def search(
    space: Space, starts: int, values: Sequence[int], quantile: float, seed: int
) -> list[Judged]:
    """All distinct attributes of two values, and one for each number of more values.

    Args:
        space: of the images.
        starts: for attributes of two values.
        values: numbers of more values.
        quantile: share of the parts in which an attribute need not be clear.
        seed: of the starts.
    """
    source = generator(seed, "starts")
    parts = parts_of(space.prompts)
    fits = two_value_fits(space, starts, source)
    found = judge(fits, 2, space, parts, quantile)
    for groups in values:
        if len(space.values) < 20 * groups:
            continue
        few = space.leading(_CLUSTERED)
        start = kmeans_memberships(few.uncentred, groups, source)
        fit = _fit_shared(few, start, parts, quantile)
        found += judge([fit], groups, few, parts, quantile)
    return found


def _fit_shared(space: Space, start: Tensor, parts: Tensor, quantile: float) -> Fit:
    """A fit without values that few parts have: their images are read anew.

    Such a value is what a prompt names, in some of its images, and takes these from the others.
    """
    fit = fit_values(space, start)
    while 1 < int((had := _had_by_most(fit, parts, quantile)).sum()) < len(had):
        left = fit.memberships[:, had].clamp(min=1e-300)
        fit = fit_values(space, left / left.sum(1, keepdim=True))
    return fit


def _had_by_most(fit: Fit, parts: Tensor, quantile: float) -> Tensor:
    """Which values all but the ``quantile`` of the parts have an image of, bool ``[K]``."""
    images = prompt_means(fit.memberships, parts) * parts.bincount()[:, None]
    return (images >= 1).double().mean(0) >= 1 - quantile


def distinct(found: list[Judged], level: float) -> list[Judged]:
    """Of those that lie in the same direction only the aligned one that explains most.

    Independent attributes lie at right angles in whitened features. What does not is the same one
    with some prompts' places mistaken, which makes images less likely, or a part of it, which tells
    less of the prompts.

    Args:
        found: of two values.
        level: p-value up to which one is aligned.
    """

    def order(each: Judged) -> tuple[bool, bool, float]:
        return each.is_aligned(level), each.possible, each.explained

    kept: list[Judged] = []
    for each in sorted(found, key=order, reverse=True):
        if not any(same_direction(each, other) for other in kept):
            kept.append(each)
    return kept


def same_direction(one: Judged, other: Judged) -> bool:
    """Whether two of two values lie in the same direction, or in opposite ones."""
    first, second = (each.fit.delta[1] - each.fit.delta[0] for each in (one, other))
    return float(cosine_similarity(first, second, dim=0).abs()) >= _SAME_ATTRIBUTE


def judge(
    fits: Sequence[Fit], sought: int, space: Space, parts: Tensor, quantile: float
) -> list[Judged]:
    """How clear and shared fits are and, where they may be attributes, how informative.

    Args:
        fits: of as many values each.
        sought: number of values that were looked for.
        space: of the images.
        parts: of the images, int64 ``[N]``.
        quantile: share of the parts in which an attribute need not be clear.
    """
    values = len(fits[0].delta)
    if values == 2:
        lines = Lines.of(fits, space)
        gained, ratios = lines.gains(parts), lines.ratios()
    else:
        gained = torch.stack([gains(fit, space, parts) for fit in fits], dim=1)
        ratios = torch.tensor([log_likelihood_ratio(fit, space) for fit in fits])
    clear = gained.sort(dim=0).values[int(quantile * len(gained))]
    freedom = int(space.prompts.max()) * (values - 1)
    evidences = (ratios - freedom).clamp(min=0) / (2 * len(space.values))
    return [
        Judged(
            fit,
            gain=float(clear[number]),
            shared=bool(_had_by_most(fit, parts, quantile).all()),
            sought=sought,
            ratio=float(ratios[number]),
            evidence=float(evidences[number]),
        )
        for number, fit in enumerate(fits)
    ]


def compared(each: Judged, space: Space, level: float, seed: int) -> Judged:
    """With what comparing the parts tells: alignment, its p-value and the difference of shares.

    The p-value is small enough to be compared with ``level``.

    Unrelated differences point anywhere in whitened features. How alike two are is told in features
    of variance 1, whose leading components are what images differ in most: the others, where
    differences are a matter of detail, are many and would drown them.
    """
    space = space.leading(each.fit.components)
    parts = parts_of(space.prompts)
    count = int(parts.max()) + 1
    if count < 2 or not each.possible:
        return each
    groups = each.fit.memberships.shape[1]
    centroids = space.values.new_zeros(count, groups, space.values.shape[1])
    masses = space.values.new_zeros(count, groups)
    for part in range(count):
        rows = parts == part
        alone = fit_values(space.rows(rows), each.fit.memberships[rows], _ALONE_ROUNDS)
        masses[part], centroids[part] = alone.memberships.mean(0), alone.delta
    alignment = _mean_cosine((centroids * space.deviations)[None], masses)
    source = generator(seed, "rotations")
    as_large, drawn, most = 0, 0, max(_ROTATIONS, math.ceil(2 / level))
    while drawn < most and as_large < _AS_ALIGNED:
        turned = _turned(centroids, _ROTATIONS_TOGETHER, source) * space.deviations
        as_large += int((_mean_cosine(turned, masses) >= alignment).sum())
        drawn += _ROTATIONS_TOGETHER
    read = cross_read_shares(space, each.fit.memberships, parts)
    return replace(
        each,
        alignment=float(alignment),
        p_alignment=p_value(as_large, drawn),
        difference=min(map(difference_of, (each.fit.shares, read))),
    )


def p_value(as_large: int, drawn: int) -> float:
    """Where so many of what was drawn under the null are as large."""
    return (as_large + 1) / (drawn + 1)


def difference_of(shares: Tensor) -> float:
    """Twice the standard deviation of the prompts' shares, of the value that differs most."""
    return 2 * float((shares - shares.mean(0)).square().mean(0).max().sqrt())


def each_level(found: Sequence[Judged], alpha: float) -> float:
    """Level of a test of each that keeps to ``alpha`` for all that might be one (Bonferroni)."""
    return alpha / max(sum(each.possible for each in found), 1)


def _turned(centroids: Tensor, number: int, source: torch.Generator) -> Tensor:
    """Parts' centroids ``[P, K, D]``, each part's turned at random: ``[R, P, K, D]``."""
    # Values have mean 0, so that K - 1 dimensions span them, however many components there are.
    spanned = centroids.shape[1] - 1
    left, lengths, _ = torch.linalg.svd(centroids, full_matrices=False)
    left, lengths = left[:, :, :spanned], lengths[:, :spanned]
    shape = (number, len(centroids), centroids.shape[2], lengths.shape[1])
    axes = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=source)).Q
    return torch.einsum("pkj,rpdj->rpkd", left * lengths[:, None], axes)


def _mean_cosine(centroids: Tensor, masses: Tensor) -> Tensor:
    """Cosine of the parts' centroids ``[R, P, K, D]``, mean over pairs by length: ``[R]``."""
    # Where few images of a part have a value, noise places it: such values count for little.
    weights = (masses + 1e-4).log().mean(0).exp()
    weights = weights / weights.sum()
    centred = centroids - torch.einsum("k,rpkd->rpd", weights, centroids)[:, :, None]
    flat = (centred * weights.sqrt()[:, None]).flatten(2)
    lengths = flat.norm(dim=2)
    inner = flat.sum(1).square().sum(1) - lengths.square().sum(1)
    return inner / (lengths.sum(1).square() - lengths.square().sum(1)).clamp(min=1e-12)
