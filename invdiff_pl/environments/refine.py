"""Sharper scores from cruder ones: cut in two, and project on what tells the parts apart."""

from typing import NamedTuple

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.environments.cuts import best_cut, prompt_means, upper_groups
from invdiff_pl.environments.directions import sharpen, whitening_of

# Directions that each prompt's refinement starts from, the length at most of what is added to the
# scores' own unit direction, and rounds of cutting and projecting: most end after ten.
STARTS = 24
FARTHEST = 1.5
ROUNDS = 20
# Correlation with the scores started from, below which the direction is of something else.
LEAST_LIKENESS = 0.5
# Share of a prompt's images, of a group that is no group but outliers.
LEAST_GROUP = 0.005
# Of what the clearest groups found in normal values leave unexplained, what clear groups may leave.
LESS_UNEXPLAINED = 0.85
# Images of a prompt that directions are sought among; more would not make them better.
IMAGES = 20_000
# Ridge against unit variance.
RIDGE = 0.1
# Clarity that a discriminant of given groups must have; normal values reach 0.
CLEAR = 0.12
# Images to each column below which a covariance would only fit noise.
LEAST_IMAGES = 5


class Refined(NamedTuple):
    """Scores, sharpened prompt by prompt; float64 ``[N]``, standardised where they were.

    Attributes:
        scores: where that made clearer groups, else those started from.
        ends: where it led, however clear; those started from where there is no way to tell.
    """

    scores: Tensor
    ends: Tensor


def refine(table: Tensor, scores: Tensor, prompts: Tensor) -> Refined:
    """Cut each prompt's scores in two, take the discriminant of the parts, and so on.

    This ends where a cut and its discriminant agree, which may be halfway between two attributes.
    So it is done from several directions around the scores', and of their ends the one is taken of
    most merit: the square of the share of the scores' variance that goes along with it, over the
    share of its own that its groups leave unexplained. What the scores show comes before what is
    clearest, which may be something else of this prompt only. A prompt keeps its scores if it has
    too few images for a covariance, or if that end is no clearer than they, and by
    :data:`LESS_UNEXPLAINED` than can be found in normal values.

    Args:
        table: float64 ``[N, D]``, of about unit variance.
        scores: float64 ``[N]`` to start from.
        prompts: int64 ``[N]``.

    Returns:
        turned as the scores are.
    """
    refined = Refined(scores.clone(), scores.clone())
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        if len(rows) < LEAST_IMAGES * table.shape[1]:
            continue
        source = generator(0, "refine", prompt)
        used = rows
        if len(rows) > IMAGES:
            used = rows[torch.randperm(len(rows), generator=source)[:IMAGES]]
        end = _clearest(table[used], scores[used], source)
        if end is None:
            continue
        projected = table[rows] @ end.weights
        refined.ends[rows] = (projected - projected.mean()) / projected.std()
        if end.clearer:
            refined.scores[rows] = refined.ends[rows]
    return refined


class _End(NamedTuple):
    weights: Tensor
    clearer: bool


def _clearest(values: Tensor, scores: Tensor, source: torch.Generator) -> _End | None:
    """The direction ``[D]`` of clear groups near one prompt's scores, if there is one."""
    centred = values - values.mean(0)
    whitening = whitening_of(centred, RIDGE)
    readings = centred @ whitening
    cut = best_cut(scores)
    upper = (scores > cut.threshold).to(readings)
    own = readings.T @ (upper - upper.mean())
    if own.norm() == 0:
        return None
    directions = _ends(readings, own / own.norm(), source)
    ends = readings @ directions
    found = best_cut(ends)
    likeness = torch.corrcoef(torch.cat([scores[:, None], ends], dim=1).T)[0, 1:]
    alike = likeness.abs() >= LEAST_LIKENESS
    large = torch.minimum(found.upper, 1 - found.upper) >= LEAST_GROUP
    unexplained = (1 - found.clarity).clamp(min=torch.finfo(found.clarity.dtype).eps)
    merit = torch.where(alike & large, likeness**4 / unexplained, 0.0)
    best = int(merit.argmax())
    if merit[best] == 0:
        return None
    by_chance = 1 - LESS_UNEXPLAINED * (1 - _clarity_by_chance(readings, source))
    return _End(
        weights=whitening @ directions[:, best] * likeness[best].sign(),
        clearer=bool(found.clarity[best] > max(float(cut.clarity), by_chance)),
    )


def _ends(readings: Tensor, towards: Tensor, source: torch.Generator) -> Tensor:
    """Where cutting and projecting leads from directions around one, unit ``[K, STARTS]``."""
    aside = torch.randn(len(towards), STARTS, generator=source, dtype=towards.dtype)
    aside = aside / aside.norm(dim=0) * torch.linspace(0, FARTHEST, STARTS, dtype=towards.dtype)
    one_prompt = torch.zeros(len(readings), dtype=torch.int64)
    return sharpen(readings, towards[:, None] + aside, one_prompt, rounds=ROUNDS)


def _clarity_by_chance(readings: Tensor, source: torch.Generator) -> float:
    """How clear the clearest end is where there are no groups: in normal readings.

    The fewer images to a reading, the more clearly can these be made to fall into two.
    """
    noise = torch.randn(readings.shape, generator=source, dtype=readings.dtype)
    noise = noise - noise.mean(0)
    towards = torch.randn(readings.shape[1], generator=source, dtype=readings.dtype)
    return float(best_cut(noise @ _ends(noise, towards / towards.norm(), source)).clarity.max())


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
        if len(rows) < LEAST_IMAGES * width or upper.sum() < 2 or (~upper).sum() < 2:
            continue
        whitening = whitening_of(values - values.mean(0), RIDGE)
        towards = values[upper].mean(0) - values[~upper].mean(0)
        projected = values @ (whitening @ (whitening.T @ towards))
        own = float(best_cut(scores[rows]).clarity)
        if best_cut(projected).clarity > max(CLEAR, own):
            refined[rows] = (projected - projected.mean()) / projected.std()
    return refined


def by_group(scores: Tensor, prompts: Tensor, families: Tensor | None = None) -> Tensor:
    """Scores shifted, scaled and turned so that all prompts can be compared.

    Args:
        scores: ``[N]``.
        prompts: int64 ``[N]``.
        families: int64 ``[N]``, of prompts whose scores are turned alike, by which of the upper and
            the lower group is the smaller in all of them; each prompt by itself if not given.

    Returns:
        float64 ``[N]``: of each prompt's two groups (by the best cut) the larger has mean 0, the
        smaller mean 1. 0 where a prompt's scores do not vary.
    """
    families = prompts if families is None else families
    upper = upper_groups(scores.double(), prompts)
    turned_down = prompt_means(upper.double(), families)[families] > 0.5
    turned = torch.zeros_like(scores, dtype=torch.float64)
    for prompt in prompts.unique().tolist():
        rows = (prompts == prompt).nonzero().squeeze(1)
        values, above = scores[rows].double(), upper[rows]
        if not above.any() or above.all():
            continue
        large, small = values[~above].mean(), values[above].mean()
        if turned_down[rows[0]]:
            large, small = small, large
        turned[rows] = (values - large) / (small - large)
    return turned
