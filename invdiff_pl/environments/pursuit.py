"""Projection pursuit for a hidden attribute that goes along with the prompts.

Under the *empty* prompt, an image's losses under common noises are readings of what it shows, by
the same functions for all images. If prompts differ in how often a hidden attribute takes each of
its values, some direction of these readings falls into the same groups in every prompt, in
different proportions. Differences of means do not tell such a direction: prompts differ in mean by
what they name. Differences of *shape* do, since moving a prompt's images does not change the shape
of their distribution: a minority of dark among light has its long tail on the other side than a
minority of light among dark. What varies alike in all prompts has the same shape in all.

So directions are sought along which prompts differ most in skewness (by a bounded measure of it)
while each prompt's images fall into two groups, and sharpened by cutting in two and taking the
discriminant of the parts; all by two ways of cutting, side by side. Half of the images find
candidates, the other half chooses among them, by how clearly they fall into groups that all prompts
share in different proportions: what only fits the images it was found on does not last there. The
best of both halves are sharpened on all images, and compared once more. Where directions of much
the same evidence are left, all are told: refining them prompt by prompt decides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.environments.cuts import prompt_means
from invdiff_pl.environments.directions import (
    RULES,
    SHARPENINGS,
    candidates,
    distinct,
    sharpen,
    whitening_of,
)
from invdiff_pl.environments.figures import Direction, likeliest, measured

# Images that directions are sought among; more would not make them better, only slower.
IMAGES = 20_000
# Directions of each half that the last choice is made among, on all images.
FINALISTS = 4
# Most directions that are told of, and the least evidence for one, of the most.
RIVALS = 3
LEAST_RIVAL = 0.4
# Images to each reading below which directions would only fit noise.
LEAST_IMAGES = 4


@dataclass(frozen=True)
class HiddenAttribute:
    """What goes along with the prompts, as far as the readings tell.

    Attributes:
        scores: float64 ``[N]``, of mean 0 in every prompt; they fall into two groups, the same in
            all prompts.
        held_out: the direction found on one half of the images, with its figures on the other.
        agreement: how well the other half has found it too: the largest absolute correlation of
            its scores with those of any candidate from there, in [0, 1].
        evidence: for the scores, on all images, see
            :class:`~invdiff_pl.environments.figures.Direction`.
    """

    scores: Tensor
    held_out: Direction
    agreement: float
    evidence: float


def hidden_attributes(
    table: Tensor,
    prompts: Tensor,
    seed: int = 0,
    suggestions: Tensor | None = None,
    families: Tensor | None = None,
) -> list[HiddenAttribute]:
    """The directions along which prompts differ most clearly in the shares of common groups.

    Args:
        table: readings ``[N, D]``.
        prompts: int64 ``[N]``.
        seed: of halves, starting directions and, beyond :data:`IMAGES`, the images used.
        suggestions: other scores ``[N, S]``, of any sign in a prompt; the directions that tell
            their groups apart are among the candidates.
        families: int64 ``[N]``, of prompts that are not compared for alignment, see
            :func:`~invdiff_pl.environments.figures.alignments`.

    Returns:
        that of most evidence, and its rivals, no two alike: at most :data:`RIVALS`, of at least
        :data:`LEAST_RIVAL` of its evidence; the most first. None where there is nothing to compare:
        one prompt, readings that do not vary, or fewer images than four a reading.
    """
    count = min(len(table), IMAGES)
    if count < LEAST_IMAGES * table.shape[1]:
        return []
    rows = torch.randperm(len(table), generator=generator(seed, "halves"))[:count]
    values, numbers = table[rows].double(), prompts[rows].unique(return_inverse=True)[1]
    family_of = numbers if families is None else families[rows]
    halves = torch.arange(count).split((count + 1) // 2)
    tried: list[Tensor] = []
    finalists: list[Direction] = []
    origins: list[int] = []
    for half, (fit, check) in enumerate((halves, halves[::-1])):
        hints = None if suggestions is None else suggestions[rows][fit]
        weights = candidates(values[fit], numbers[fit], seed, hints)
        if weights is None:
            return []
        tried.append(weights)
        chosen = _of_most_evidence(values[check], numbers[check], family_of[check], weights)
        finalists += chosen
        origins += [half] * len(chosen)
    centred = values - prompt_means(values, numbers)[numbers]
    found = []
    for number, final in _rivals(centred, numbers, family_of, finalists):
        best, others = finalists[number], tried[1 - origins[number]]
        scores = centred @ torch.cat([best.weights[:, None], others], dim=1)
        agreement = float(torch.corrcoef(scores.T)[0, 1:].abs().nan_to_num(0.0).max())
        projected = table.double() @ final.weights
        projected = projected - prompt_means(projected, prompts)[prompts]
        found.append(HiddenAttribute(projected, best, agreement, final.evidence))
    return found


def _of_most_evidence(
    values: Tensor, prompts: Tensor, families: Tensor, weights: Tensor
) -> list[Direction]:
    """The :data:`FINALISTS` of most evidence on these images, of directions ``[D, C]``."""
    ahead = weights[:, likeliest(values, prompts, weights, families)]
    directions = measured(values, prompts, ahead, families)
    return sorted(directions, key=lambda each: each.evidence, reverse=True)[:FINALISTS]


def _rivals(
    centred: Tensor, prompts: Tensor, families: Tensor, finalists: list[Direction]
) -> list[tuple[int, Direction]]:
    """Where sharpening on all images leads to, and from which of the finalists.

    Sharpening may lose the groups of some prompts, so its steps are compared too, from none on.
    """
    whitening = whitening_of(centred)
    weights = torch.stack([direction.weights for direction in finalists], dim=1)
    steps = [torch.linalg.lstsq(whitening, weights).solution]
    for rule in RULES:
        once = sharpen(centred @ whitening, steps[0], prompts, rule, rounds=1)
        steps += [once, sharpen(centred @ whitening, once, prompts, rule, SHARPENINGS - 1)]
    directions = measured(centred, prompts, whitening @ torch.cat(steps, dim=1), families)
    order = sorted(range(len(directions)), key=lambda each: -directions[each].evidence)
    least = LEAST_RIVAL * directions[order[0]].evidence
    order = [each for each in order if directions[each].evidence >= least]
    ahead = torch.stack([directions[each].weights for each in order], dim=1)
    apart = distinct(centred @ ahead)[:RIVALS].tolist()
    return [(order[each] % len(finalists), directions[order[each]]) for each in apart]
