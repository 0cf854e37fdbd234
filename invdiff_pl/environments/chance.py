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
    p_value,
    parts_of,
    same_direction,
    search,
)
from invdiff_pl.environments.settings import HiddenAttributeSettings
from invdiff_pl.environments.shared_values import fit_values
from invdiff_pl.environments.space import Space
from invdiff_pl.utils.threads import map_in_torch_threads

# Images per resample: under the null, ratios hardly depend on their number (Wilks).
_NULL_IMAGES = 1500


def by_chance(
    space: Space, judged: list[Judged], level: float, settings: HiddenAttributeSettings
) -> list[float | None]:
    """Return how often shares would differ as much as each candidate's if all prompts were alike.

    ``None`` for a candidate that is not tested, because its shares hardly differ or it is not
    aligned at the ``level``. Resampling stops as soon as no candidate can be a bias any more.
    """
    asked = [uneven(each, settings) and each.is_aligned(level) for each in judged]
    tested = [each for each, is_asked in zip(judged, asked, strict=True) if is_asked]
    if not tested:
        return [None] * len(judged)
    more = sorted({each.sought for each in tested} - {2})
    places = torch.zeros_like(space.offsets)
    places[:, : tested[0].fit.components] = tested[0].fit.places
    observed = [_strength(each, space, settings) for each in tested]

    def reached(number: int) -> list[bool]:
        source = generator(settings.seed, "resample", number)
        rows = _resampled(space.prompts, source)
        dealt = space.rows(rows).dealt(source, places[space.prompts[rows].unique()])
        found = search(dealt, settings.starts, more, settings.quantile, settings.seed)
        return _reached(found, dealt, tested, observed, settings)

    as_large, drawn = [0] * len(tested), 0
    for each in map_in_torch_threads(reached, range(settings.resamples)):
        as_large = [count + new for count, new in zip(as_large, each, strict=True)]
        drawn += 1
        if p_value(min(as_large), settings.resamples) > settings.alpha:
            break
    chances = iter([p_value(count, drawn) for count in as_large])
    return [next(chances) if is_asked else None for is_asked in asked]


def _reached(
    found: list[Judged],
    space: Space,
    tested: list[Judged],
    observed: list[float],
    settings: HiddenAttributeSettings,
) -> list[bool]:
    """Whether anything that would pass for an attribute is as strong as each tested candidate."""
    level = each_level(found, settings.alpha)

    @cache
    def judged(number: int) -> Judged:
        return compared(found[number], space, level, settings.seed)

    def is_taken(number: int) -> bool:
        each = judged(number)
        return each.is_aligned(level) and not any(
            judged(rival).is_aligned(level) and judged(rival).explained > each.explained
            for rival, other in enumerate(found)
            if each.sought == other.sought == 2 and same_direction(each, other)
        )

    return [
        any(
            is_taken(number)
            for number, other in enumerate(found)
            if other.sought == each.sought and other.strength >= strength
        )
        for each, strength in zip(tested, observed, strict=True)
    ]


def _strength(each: Judged, space: Space, settings: HiddenAttributeSettings) -> float:
    """Return a candidate's strength in as many prompts as a resample has."""
    if not are_small(space.prompts):
        return each.strength
    rows = _resampled(space.prompts, generator(settings.seed, "observed"))
    some = space.rows(rows).leading(each.fit.components)
    fit = fit_values(some, each.fit.memberships[rows])
    return judge([fit], each.sought, some, parts_of(some.prompts), settings.quantile)[0].strength


def _resampled(prompts: Tensor, source: torch.Generator) -> Tensor:
    """Return the rows of a resample: any images or, if prompts are small, all images of some.

    A ratio grows with the number of prompts, and one image tells nothing about a prompt's shares.
    """
    sizes = prompts.bincount()
    if not are_small(prompts):
        return torch.randperm(len(prompts), generator=source)[:_NULL_IMAGES]
    order = torch.randperm(len(sizes), generator=source)
    chosen = torch.zeros_like(sizes, dtype=torch.bool)
    chosen[order[sizes[order].cumsum(0) <= max(_NULL_IMAGES, int(sizes.max()))]] = True
    return chosen[prompts].nonzero().squeeze(1)


def uneven(each: Judged, settings: HiddenAttributeSettings) -> bool:
    """Whether shares differ enough between prompts for a candidate to be a bias."""
    return each.possible and each.difference >= settings.least_difference
