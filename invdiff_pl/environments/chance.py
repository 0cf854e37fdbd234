"""How often chance alone would make shares differ as much: the test of shares, by resampling.

The test is described in :mod:`invdiff_pl.environments.hidden_attribute`.
"""

from functools import cache

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.environments.judging import (
    Judged,
    are_small,
    compared,
    each_level,
    judge,
    parts_of,
    same_direction,
    search,
)
from invdiff_pl.environments.settings import HiddenAttributeSettings
from invdiff_pl.environments.shared_values import fit_values
from invdiff_pl.environments.space import Space

# Images of a resample: under the null, ratios hardly depend on how many there are (Wilks).
_NULL_IMAGES = 1500


def by_chance(
    space: Space, judged: list[Judged], level: float, settings: HiddenAttributeSettings
) -> list[float | None]:
    """How often shares would differ as much as each candidate's where all prompts are alike.

    ``None`` for a candidate that is not asked: shares hardly differ, or it is not aligned at the
    ``level``.
    """
    asked = [uneven(each, settings) and each.is_aligned(level) for each in judged]
    tested = [each for each, is_asked in zip(judged, asked, strict=True) if is_asked]
    if not tested:
        return [None] * len(judged)
    wanted = {each.sought for each in tested}
    more = sorted(wanted - {2})
    places = torch.zeros_like(space.offsets)
    places[:, : tested[0].fit.components] = tested[0].fit.places
    largest: dict[int, list[float]] = {groups: [] for groups in wanted}
    for number in range(settings.resamples):
        source = generator(settings.seed, "resample", number)
        rows = _resampled(space.prompts, source)
        dealt = space.rows(rows).dealt(source, places[space.prompts[rows].unique()])
        found = search(dealt, settings.starts, more, settings.quantile, settings.seed)
        for groups in wanted:
            those = [each for each in found if each.sought == groups]
            largest[groups].append(_strongest(those, dealt, settings))
    null = {groups: torch.tensor(strengths) for groups, strengths in largest.items()}
    return [
        float((null[each.sought] >= _strength(each, space, settings)).sum() + 1)
        / (settings.resamples + 1)
        if is_asked
        else None
        for each, is_asked in zip(judged, asked, strict=True)
    ]


def _strongest(found: list[Judged], space: Space, settings: HiddenAttributeSettings) -> float:
    """The largest strength of what would be taken for an attribute that prompts share."""
    level = each_level(found, settings.alpha)

    @cache
    def is_alike(number: int) -> bool:
        judged = compared(found[number], space, settings.seed)
        return judged.is_aligned(level)

    def taken(number: int) -> bool:
        each = found[number]
        return not any(
            other.explained > each.explained and same_direction(each, other) and is_alike(rival)
            for rival, other in enumerate(found)
            if each.sought == other.sought == 2
        )

    # Most are not asked, for what is stronger is.
    order = sorted(range(len(found)), key=lambda number: found[number].strength, reverse=True)
    return next((found[n].strength for n in order if is_alike(n) and taken(n)), 0.0)


def _strength(each: Judged, space: Space, settings: HiddenAttributeSettings) -> float:
    """A candidate's strength in as many prompts as a resample has."""
    if not are_small(space.prompts):
        return each.strength
    rows = _resampled(space.prompts, generator(settings.seed, "observed"))
    some = space.rows(rows).leading(each.fit.components)
    fit = fit_values(some, each.fit.memberships[rows])
    return judge(fit, each.sought, some, parts_of(some.prompts), settings.quantile).strength


def _resampled(prompts: Tensor, source: torch.Generator) -> Tensor:
    """Rows of a resample: any of the images or, of small prompts, all images of some.

    A ratio grows with the number of prompts, and one image of a prompt tells nothing of its shares.
    """
    sizes = prompts.bincount()
    if not are_small(prompts):
        return torch.randperm(len(prompts), generator=source)[:_NULL_IMAGES]
    order = torch.randperm(len(sizes), generator=source)
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    chosen[order[sizes[order].cumsum(0) <= max(_NULL_IMAGES, int(sizes.max()))]] = True
    return chosen[prompts].nonzero().squeeze(1)


def uneven(each: Judged, settings: HiddenAttributeSettings) -> bool:
    """Whether shares differ between prompts by so much that it may be a bias."""
    return each.possible and each.difference >= settings.least_difference
