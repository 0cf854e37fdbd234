"""What counts for a hidden attribute: that it is clear, shared, informative, aligned.

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
# Rounds in which a part refits its groups alone: enough to leave a direction not its own.
_ALONE_ROUNDS = 10
# Rotations are drawn in batches until `_AS_ALIGNED` are as aligned (Besag and Clifford, Biometrika
# 78, 1991), or there are `_ROTATIONS`, and enough for a p-value of half the level.
_AS_ALIGNED, _ROTATIONS, _ROTATIONS_TOGETHER = 20, 1998, 111
# Components that many values are looked for in: among more, distances hardly separate clusters.
_CLUSTERED = 20
# Cosine from which on two attributes of two values count as one.
_SAME_ATTRIBUTE = 0.5


@dataclass(frozen=True)
class Judged:
    """A fit and what counts for it.

    Attributes:
        fit: a fit of two or more values.
        gain: log-likelihood per image of the groups over one group, in the less clear parts.
        shared: whether (nearly) all parts have all of its values.
        sought: number of values that were looked for.
        ratio: twice the log-likelihood of own over equal shares.
        evidence: what chance does not explain of the ratio, in nats per image.
        alignment: cosine between parts of their differences between groups.
        p_alignment: how often the cosine of unrelated parts is as large.
        difference: difference between prompts' shares, as estimated from their own images or as
            implied by the other parts, whichever is less.
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
        """Whether the fit may be an attribute that prompts share."""
        return self.gain > 0 and self.shared

    def is_aligned(self, level: float) -> bool:
        """Whether the fit may be an attribute that prompts share, aligned at a level."""
        return self.possible and self.p_alignment <= level

    @property
    def explained(self) -> float:
        """Log-likelihood plus likelihood ratio, which says how uneven shares are, per image.

        The ratio counts only as far as the other parts confirm that shares differ.
        """
        likelihood, own = self.fit.log_likelihood, difference_of(self.fit.shares)
        confirmed = self.difference / own if own > 0 else 0.0
        return float(likelihood.mean()) + confirmed * self.ratio / len(likelihood)

    @property
    def strength(self) -> float:
        """How clear the fit is times how uneven it is.

        Naming one of K values takes log K nats, so more values should gain more; and chance adds
        more to the ratio if there are many shares.
        """
        clear = max(self.gain, 0.0) / math.log(self.values)
        uneven = 2 * len(self.fit.memberships) * self.evidence
        return clear * uneven**0.5


def parts_of(prompts: Tensor) -> Tensor:
    """Return the part that each image is judged in, int64 ``[N]``: prompts, small ones together."""
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
    """Whether prompts have few images on average."""
    return len(prompts) / (int(prompts.max()) + 1) < PART_IMAGES


def search(
    space: Space, starts: int, values: Sequence[int], quantile: float, seed: int
) -> list[Judged]:
    """Find all distinct attributes of two values, and one for each larger number of values.

    Args:
        space: space of the images.
        starts: number of starts for attributes of two values.
        values: larger numbers of values.
        quantile: share of the parts in which an attribute need not be clear.
        seed: seed of the starts.
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
    """Fit values, dropping those that few parts have and assigning their images anew.

    Such a value is what a prompt names, and takes some of its images from the other values.
    """
    fit = fit_values(space, start)
    while 1 < int((had := _had_by_most(fit, parts, quantile)).sum()) < len(had):
        left = fit.memberships[:, had].clamp(min=1e-300)
        fit = fit_values(space, left / left.sum(1, keepdim=True))
    return fit


def _had_by_most(fit: Fit, parts: Tensor, quantile: float) -> Tensor:
    """Which values occur in all but a share ``quantile`` of the parts, bool ``[K]``."""
    images = prompt_means(fit.memberships, parts) * parts.bincount()[:, None]
    return (images >= 1).double().mean(0) >= 1 - quantile


def distinct(found: list[Judged], level: float) -> list[Judged]:
    """Keep, of attributes that lie in the same direction, only the aligned one that explains most.

    Independent attributes lie at right angles in whitened features. One that does not is the same
    attribute with some prompts' places mistaken, which makes images less likely, or a part of it,
    which tells less about the prompts.

    Args:
        found: attributes of two values.
        level: p-value up to which an attribute counts as aligned.
    """

    def order(each: Judged) -> tuple[bool, bool, float]:
        return each.is_aligned(level), each.possible, each.explained

    kept: list[Judged] = []
    for each in sorted(found, key=order, reverse=True):
        if not any(same_direction(each, other) for other in kept):
            kept.append(each)
    return kept


def same_direction(one: Judged, other: Judged) -> bool:
    """Whether two attributes of two values lie in the same direction, or in opposite ones."""
    first, second = (each.fit.delta[1] - each.fit.delta[0] for each in (one, other))
    return float(cosine_similarity(first, second, dim=0).abs()) >= _SAME_ATTRIBUTE


def judge(
    fits: Sequence[Fit], sought: int, space: Space, parts: Tensor, quantile: float
) -> list[Judged]:
    """Judge how clear, shared and informative fits are.

    Args:
        fits: fits with the same number of values.
        sought: number of values that were looked for.
        space: space of the images.
        parts: part of each image, int64 ``[N]``.
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
    """Compare the parts: add alignment, its p-value and the difference of shares to a judgement.

    Enough rotations are drawn for the p-value to be compared with ``level``.

    Unrelated differences point anywhere in whitened features. Their cosines are taken in features
    of variance 1, whose leading components are what images differ in most: the other components,
    where differences are a matter of detail, are many and would drown them.
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
    """Return the p-value if ``as_large`` of ``drawn`` values under the null are as large."""
    return (as_large + 1) / (drawn + 1)


def difference_of(shares: Tensor) -> float:
    """Return twice the standard deviation of prompts' shares, for the value that differs most."""
    return 2 * float((shares - shares.mean(0)).square().mean(0).max().sqrt())


def each_level(found: Sequence[Judged], alpha: float) -> float:
    """Return the level of each test that holds all possible ones to ``alpha`` (Bonferroni)."""
    return alpha / max(sum(each.possible for each in found), 1)


def _turned(centroids: Tensor, number: int, source: torch.Generator) -> Tensor:
    """Rotate the centroids ``[P, K, D]`` of each part at random: ``[R, P, K, D]``."""
    # Values have mean 0, so K - 1 dimensions span them, however many components there are.
    spanned = centroids.shape[1] - 1
    left, lengths, _ = torch.linalg.svd(centroids, full_matrices=False)
    left, lengths = left[:, :, :spanned], lengths[:, :spanned]
    shape = (number, len(centroids), centroids.shape[2], lengths.shape[1])
    axes = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=source)).Q
    return torch.einsum("pkj,rpdj->rpkd", left * lengths[:, None], axes)


def _mean_cosine(centroids: Tensor, masses: Tensor) -> Tensor:
    """Return the cosines of parts' centroids ``[R, P, K, D]``, averaged by length: ``[R]``."""
    # A value that few images of a part have is placed by noise: such values count for little.
    weights = (masses + 1e-4).log().mean(0).exp()
    weights = weights / weights.sum()
    centred = centroids - torch.einsum("k,rpkd->rpd", weights, centroids)[:, :, None]
    flat = (centred * weights.sqrt()[:, None]).flatten(2)
    lengths = flat.norm(dim=2)
    inner = flat.sum(1).square().sum(1) - lengths.square().sum(1)
    return inner / (lengths.sum(1).square() - lengths.square().sum(1)).clamp(min=1e-12)
