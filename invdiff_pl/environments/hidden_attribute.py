"""Hidden attributes that go along with prompts, from one feature vector per image.

The model
---------
Image i of prompt p has features, on D principal components,

    z_i = m_p + delta_{a_i} + e_i,      a_i ~ Categorical(pi_p),      e_i ~ N(0, Sigma).

What the prompt names shifts all of its images alike: this is ``m_p``, the prompt's place. The
hidden attribute ``a`` takes one of K values, which look the same in every prompt (``delta``) but
need not be equally frequent in all of them (``pi_p``). A *bias* is a ``pi_p`` that differs between
prompts; an image goes against it if its value is rarer in its own prompt than elsewhere:

    conflict_i = - sum_k r_ik log(pi_pk / mean_q pi_qk),      r_ik = P(a_i = k | z_i).

Fitting
-------
Centre z by prompt and whiten it, so that its covariance within prompts is I. Write rbar_p for the
mean of r over a prompt's images. Expectation maximisation then has steps in closed form:

    delta = A^-1 B,  A = diag(mean r) - mean_p rbar_p rbar_p',  B = mean (r_i - rbar_p) z_i'
    m_p = - rbar_p delta,   Sigma = I - B' delta,   pi_p = rbar_p
    r_ik ~ pi_pk exp(delta_k' Sigma^-1 (z_i - m_p - delta_k / 2))

For K = 2 everything happens along w = Sigma^-1 (delta_1 - delta_0), so many starts are climbed at
once.

Where to start
--------------
The third cumulant of a minority of share pi is ``pi (1 - pi) (1 - 2 pi)`` times the distance
cubed: its sign flips in a prompt with the mirrored share, which covariances cannot show. Half of
the starts climb the spread over prompts of a bounded skewness, ``mean tanh(y / sd)``; the others
are random directions, for attributes that are not skewed. The starts are climbed among a few
leading components first, where whatever varies much is found soon, and then among all components,
since a rare value varies little and shows in details. An attribute of many values (a place that is
one of twenty scenes) has no such direction: its K values start from k-means of features that are
*not* centred by prompt, and the fit finds the ``m_p``. Values that few prompts show are dropped and
their images assigned anew, until (nearly) all prompts have an image of each value: what one prompt
alone shows is what that prompt names, and as a value it would take images from the others.

What counts
-----------
*Clear*: the log-likelihood per image that two groups gain over one, both with the prompt's own
width, in all but the ``quantile`` least clear prompts. *Shared*: (nearly) all prompts have all
values. *Informative*: the log-likelihood ratio of each prompt's own shares over equal shares, in
nats per image, less what chance adds (half its degrees of freedom): ``evidence``. *Aligned*: the
groups of each prompt are refitted alone, and the differences between them must point the same way
in all prompts, in features of variance 1; otherwise the data do not say which group of one prompt
corresponds to which of another. *Confirmed*: shares must differ by ``least_difference`` both as
estimated from each prompt's own images and as implied by what the values look like in all *other*
prompts. If a prompt's place is mistaken, as though all its images had one value, their differences
count as noise, and ``Sigma^-1 delta`` turns away from them until they no longer show: such a fit
agrees with itself, but not with the other prompts. *One reading*: of several candidates in the same
direction, the one with the largest sum of log-likelihood and likelihood ratio is kept. A part of an
attribute (beards, as a part of gender) explains less.

The *first* candidate is the *strongest*, of two values or more: its strength is the gain per nat
that naming one of K values takes, gain / log K, times the root of the ratio, as far as chance does
not explain it. Many values also capture a little of what the prompts name, so uneven shares alone
would not do; but cuts through images that shade into each other hardly make the images likelier.

Several at once
---------------
A second attribute also lies along the first one's difference wherever the same images show both,
and to it the first one's clusters are a noise ``e`` that is not normal. So if the first candidate
is a bias of two values, the search is repeated on what it leaves unexplained,
``z_i - sum_k r_ik delta_k``, whitened anew, and the candidates found there come next. This is done
once only, since each search is tested, which is what takes the time.

The test
--------
``p_value`` is the larger of two, both by resampling. *Shares*: residuals from the first candidate's
``m_p`` are dealt anew over the prompts, which makes all prompts alike but for ``m_p``, and the
whole search is repeated (whitening and starts included); the largest strength of anything that
would pass for an aligned attribute is what chance achieves. *Alignment*: the differences between
the groups of each prompt are rotated at random, which makes prompts unrelated, and the p-value is
multiplied by the number of fits that might be an attribute, some ten or twenty, of which the
candidates are the best (Bonferroni). Only aligned candidates are tested for their shares. A bias is
reported if both p-values are at most ``alpha``; so if either null hypothesis holds, this happens in
at most ``alpha`` of data sets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.environments.chance import by_chance, uneven
from invdiff_pl.environments.judging import (
    Judged,
    are_small,
    compared,
    distinct,
    each_level,
    parts_of,
    search,
)
from invdiff_pl.environments.settings import HiddenAttributeSettings
from invdiff_pl.environments.shared_values import memberships_of
from invdiff_pl.environments.space import Space, prompt_means, require_finite, whiten
from invdiff_pl.environments.verdict import Verdict, verdict_on
from invdiff_pl.utils.errors import InvDiffError

__all__ = ["HiddenAttribute", "HiddenAttributeSettings", "Verdict", "find_hidden_attributes"]


_SEARCHES = 2


@dataclass(frozen=True)
class HiddenAttribute:
    """A hidden attribute, as far as features show it.

    Attributes:
        memberships: probability of each value, the most frequent first, float64 ``[N, G]``.
        shares: share of each value in each prompt, float64 ``[P, G]``; NaN for a prompt without
            images.
        conflict: how much rarer an image's value is in its own prompt than elsewhere, in nats,
            float64 ``[N]``.
        evidence: what the value tells about the prompt, in nats per image, at least 0.
        gain: log-likelihood per image of the groups over one group, in the less clear prompts, in
            nats.
        alignment: cosine between prompts of the differences between groups, in [-1, 1].
        p_value: p-value of the test in this module's docstring, in (0, 1]; 1 if shares differ by
            less than ``least_difference`` or nothing can be tested.
        verdict: ``"bias"``; ``"no bias"``; ``"unaligned"`` if prompts show groups in different
            shares, but the groups of different prompts do not correspond; ``"untestable"``.
        reason: the reason for the verdict, in a sentence.
    """

    memberships: Tensor
    shares: Tensor
    conflict: Tensor
    evidence: float
    gain: float
    alignment: float
    p_value: float
    verdict: Verdict
    reason: str


def find_hidden_attributes(
    features: Tensor, prompts: Tensor, settings: HiddenAttributeSettings | None = None
) -> list[HiddenAttribute]:
    """Find hidden attributes whose values are not equally frequent in all prompts.

    Args:
        features: ``[N, F]``, of any float type, finite.
        prompts: number of each image's prompt, from 0 on, int64 ``[N]``.
        settings: settings of the search; the defaults if not given.

    Returns:
        candidates, those whose shares differ between prompts first; among these the aligned ones
        precede, by strength (how clear and how uneven they are), and the others follow by how clear
        they are. A bias of two values is followed by the candidates found in what it does not
        explain. Empty if features do not vary within prompts.

    Raises:
        InvDiffError: if shapes do not match, or features are not finite.

    Example:
        >>> import torch
        >>> source = torch.Generator().manual_seed(0)
        >>> prompts = torch.arange(1000) % 2
        >>> usual = torch.tensor([0.1, 0.9])[prompts]
        >>> dark = (torch.rand(1000, generator=source) < usual).double()
        >>> noise = torch.randn(1000, 6, generator=source)
        >>> features = noise + 6 * dark[:, None] * torch.eye(6)[0] + prompts[:, None]
        >>> found = find_hidden_attributes(features, prompts)[0]
        >>> found.verdict
        'bias'
    """
    settings = settings or HiddenAttributeSettings()
    _check(features, prompts)
    order = torch.randperm(len(features), generator=generator(settings.seed, "searched images"))
    rows = order[: settings.most_images].sort().values
    numbers = prompts[rows].unique(return_inverse=True)[1]
    space = whiten(features[rows], numbers, settings.components)
    if space is None:
        return []
    values = space.of(features, prompts)
    found: list[HiddenAttribute] = []
    while True:
        judged, candidates = _searched(space, values, prompts, settings)
        found += candidates[:1]
        # Many values, fitted in fewer components, may have come down to two.
        again = bool(judged) and judged[0].sought == 2 and candidates[0].verdict == "bias"
        if not again or len(found) == min(_SEARCHES, settings.candidates):
            return [*found, *candidates[1:]][: settings.candidates]
        first = judged[0].fit
        memberships, _ = memberships_of(first, values, prompts)
        space, whitening = space.of_values(space.values - first.memberships @ first.delta)
        values = values - memberships @ first.delta
        values = (values - prompt_means(values, prompts)[prompts]) @ whitening


def _searched(
    space: Space, values: Tensor, prompts: Tensor, settings: HiddenAttributeSettings
) -> tuple[list[Judged], list[HiddenAttribute]]:
    """Find the attributes that a space shows, best first, and extend them to all images.

    Args:
        space: space of the images that are searched.
        values: components of all images in it, ``[N, D]``.
        prompts: prompt numbers of all images, int64 ``[N]``.
        settings: settings of the search.
    """
    # A prompt of few images shows few of many values: they would pass for what the prompt names.
    more = () if are_small(space.prompts) else settings.values
    found = search(space, settings.starts, more, settings.quantile, settings.seed)
    level = each_level(found, settings.alpha)
    judged = [compared(each, space, level, settings.seed) for each in found]
    judged = ranked(judged, level, settings)[: settings.candidates]
    chances = by_chance(space, judged, level, settings)
    comparable = int(parts_of(space.prompts).max()) > 0
    return judged, [
        _candidate(each, values, prompts, comparable, (p_shares, level), settings)
        for each, p_shares in zip(judged, chances, strict=True)
    ]


def ranked(judged: list[Judged], level: float, settings: HiddenAttributeSettings) -> list[Judged]:
    """Sort: uneven first, then aligned, then by strength; of many values only the first is kept."""

    def order(each: Judged) -> tuple[bool, bool, bool, float]:
        is_aligned = each.is_aligned(level)
        strength = each.strength if is_aligned else each.gain
        return uneven(each, settings), is_aligned, each.possible, strength

    two = distinct([each for each in judged if each.sought == 2], level)
    many = [each for each in judged if each.sought > 2 and each.is_aligned(level)]
    return sorted([*two, *sorted(many, key=order)[-1:]], key=order, reverse=True)


def _check(features: Tensor, prompts: Tensor) -> None:
    if features.dim() != 2 or prompts.shape != features.shape[:1]:
        raise InvDiffError(
            f"expected features [N, F] and prompts [N], found {list(features.shape)} and "
            f"{list(prompts.shape)}."
        )
    require_finite(features)


def _candidate(
    each: Judged,
    values: Tensor,
    prompts: Tensor,
    comparable: bool,
    tested: tuple[float | None, float],
    settings: HiddenAttributeSettings,
) -> HiddenAttribute:
    """Return a candidate as a hidden attribute of all images."""
    memberships, shares = memberships_of(each.fit, values[:, : each.fit.components], prompts)
    order = memberships.sum(0).argsort(descending=True)
    memberships, shares = memberships[:, order], shares[:, order]
    usual = shares.nanmean(0)
    conflict = -(memberships * (shares / usual).log()[prompts].nan_to_num()).sum(1)
    p_shares, level = tested
    p_alignment = min(1.0, each.p_alignment * settings.alpha / level)
    differs = uneven(each, settings)
    verdict: Verdict = "untestable"
    reason = "there are too few prompts or images to compare prompts."
    if comparable:
        verdict, reason = verdict_on(each, p_shares, p_alignment, settings)
    return HiddenAttribute(
        memberships=memberships,
        shares=shares,
        conflict=conflict,
        evidence=each.evidence if each.possible else 0.0,
        gain=each.gain,
        alignment=each.alignment,
        p_value=max(p_shares or 0.0, p_alignment) if differs else 1.0,
        verdict=verdict,
        reason=reason,
    )
