"""Figures of directions: how clear their groups are, whether prompts share them, in what shares."""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.environments.cuts import TWO_MEANS, cut_by_prompt, prompt_means
from invdiff_pl.environments.directions import RULES, whitening_of
from invdiff_pl.environments.mixture import fit_mixture, mixture_gains

# Of both rules' candidates, those that the costly figures are taken of.
MEASURED = 40
# The share of images whose prompts may be less clear than the clarity told: in a prompt of few
# images a minority of a few percent is too small to be cut off clearly.
UNCLEAR_IMAGES = 0.3
# How many times more a direction counts whose groups differ in the same way in all prompts, and
# alignments from and up to which that grows. Two attributes, of one prompt's images each, that show
# along one direction reach the first often and the second hardly ever.
ALIGNED = 4.0
ALIGNMENTS = (0.1, 0.3)


@dataclass(frozen=True)
class Direction:
    """A direction of the readings.

    Attributes:
        weights: float64 ``[D]``; the scores are ``(table - prompt means) @ weights``.
        clarity: of the groups by two-means, see :class:`~invdiff_pl.environments.cuts.Cut`, in the
            less clear prompts; above 0 if there are groups. A clarity that counts small groups more
            ranks pairs of them, of one prompt each, before attributes of all prompts.
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
        shapes that no groups explain: it counts by its root. Groups that are aligned count
        more; that they are not speaks against little, since an attribute may look different along
        with what the prompts name.
        """
        if min(self.clarity, self.gain, self.likelihood_ratio) <= 0:
            return 0.0
        shown = self.clarity * self.gain * self.likelihood_ratio**0.5
        return shown * float(alignment_factor(torch.tensor(self.alignment)))


def alignment_factor(alignment: Tensor) -> Tensor:
    """How much groups of some alignment count, from 1 to 1 + :data:`ALIGNED`."""
    least, enough = ALIGNMENTS
    return 1 + ALIGNED * ((alignment - least) / (enough - least)).clamp(0, 1)


def likeliest(
    values: Tensor, prompts: Tensor, weights: Tensor, families: Tensor | None = None
) -> Tensor:
    """Numbers of the directions that are ahead by clarity, by either rule, and alignment.

    At most :data:`MEASURED` of them: the other figures are costly. For the arguments see
    :func:`measured`.
    """
    told = []
    for rule in RULES:
        upper, clarity = cut_by_prompt(values @ weights, prompts, rule)
        factor = alignment_factor(alignments(values, prompts, upper.double(), families))
        told.append(less_clear(clarity, prompts) * factor)
    either = torch.stack(told).max(0).values
    return either.topk(min(MEASURED, len(either))).indices


def measured(
    values: Tensor, prompts: Tensor, weights: Tensor, families: Tensor | None = None
) -> list[Direction]:
    """The directions with their figures on these images.

    Args:
        values: readings ``[N, D]``.
        prompts: int64 ``[N]``, without gaps.
        weights: of the directions, ``[D, C]``.
        families: of prompts whose alignment says nothing, see :func:`alignments`.
    """
    scores = values @ weights
    scores = scores - prompt_means(scores, prompts)[prompts]
    upper, clarity = cut_by_prompt(scores, prompts, TWO_MEANS)
    groups = upper.double()
    start = torch.stack([1 - groups, groups], dim=2)
    figures = (
        less_clear(clarity, prompts),
        less_clear(mixture_gains(scores, prompts, start), prompts),
        likelihood_ratios(scores, prompts, start),
        alignments(values, prompts, groups, families),
    )
    return [
        Direction(column, *map(float, told))
        for column, *told in zip(weights.T, *figures, strict=True)
    ]


def likelihood_ratios(scores: Tensor, prompts: Tensor, start: Tensor) -> Tensor:
    """Twice the gain of prompts' own shares over equal ones in a mixture of two, ``[C]``."""
    own = fit_mixture(scores, prompts, start)
    equal = fit_mixture(scores, prompts, start, equal_shares=True)
    return 2 * (own.log_likelihood - equal.log_likelihood)


def alignments(
    values: Tensor, prompts: Tensor, groups: Tensor, families: Tensor | None = None
) -> Tensor:
    """Whether groups differ in the same way in all prompts.

    An attribute of all prompts' images changes the readings alike in each, unless it looks
    different along with what a prompt names. Two attributes, of one prompt's images each, may show
    along one direction, but differ in the others.

    Args:
        values: readings ``[N, D]``.
        prompts: int64 ``[N]``, without gaps.
        groups: 0 or 1, float64 ``[N, C]``.
        families: int64 ``[N]``: prompts of the same are not compared, as parts of one prompt's
            images, which share what only these show; every prompt by itself if not given.

    Returns:
        float64 ``[C]``: mean cosine between the prompts' covariances of white readings with the
        groups, over pairs of prompts, weighted by their norms; 0 where there are no pairs.
    """
    values = values - prompt_means(values, prompts)[prompts]
    readings = values @ whitening_of(values)
    centred = groups - prompt_means(groups, prompts)[prompts]
    family_of = prompts if families is None else families
    # Sums over pairs of different families: those over all pairs less those within a family.
    norms, squares, products = torch.zeros(3, groups.shape[1], dtype=torch.float64)
    for family in family_of.unique().tolist():
        rows = family_of == family
        own = [
            readings[rows & (prompts == prompt)].T @ centred[rows & (prompts == prompt)]
            for prompt in prompts[rows].unique().tolist()
        ]
        lengths = torch.stack([each.norm(dim=0) for each in own]).sum(0)
        norms, squares = norms + lengths, squares + lengths.square()
        products = products + torch.stack(own).sum(0).square().sum(0)
    total = (readings.T @ centred).square().sum(0)
    pairs = norms.square() - squares
    compared = pairs > 1e-9 * norms.square()  # else rounding errors
    return torch.where(compared, (total - products) / torch.where(compared, pairs, 1.0), 0.0)


def less_clear(figures: Tensor, prompts: Tensor) -> Tensor:
    """The figure ``[P, C]`` that prompts of :data:`UNCLEAR_IMAGES` do not exceed, ``[C]``."""
    ordered, order = figures.sort(dim=0)
    sizes = prompts.bincount().double() / len(prompts)
    reached = sizes[order].cumsum(0) >= UNCLEAR_IMAGES
    return ordered.gather(0, reached.int().argmax(0)[None])[0]
