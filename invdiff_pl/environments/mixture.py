"""A mixture that all prompts share: the same groups, in proportions of each prompt's own.

What a prompt names shifts all its images' scores alike; a hidden attribute that goes along with
the prompts shows as groups at the same distances in every prompt, in different proportions. So
image i of prompt y has the score ``offset_y + mean_g + noise`` with probability ``share_yg``.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from invdiff_pl.environments.cuts import prompt_means

ITERATIONS = 100
# Noise variance, of standardised scores, below which groups are as sharp as they need be.
LEAST_VARIANCE = 0.02
LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class SharedMixture:
    """A fitted mixture of each of C columns.

    Attributes:
        log_likelihood: natural logarithm, of all images together, float64 ``[C]``.
        memberships: probability of each group given the score, float64 ``[N, C, G]``.
        shares: of each group in each prompt, float64 ``[P, C, G]``.
        means: of the groups, in standard deviations of the scores, float64 ``[C, G]``.
        variance: of the noise, in squared standard deviations, float64 ``[C]``.
    """

    log_likelihood: Tensor
    memberships: Tensor
    shares: Tensor
    means: Tensor
    variance: Tensor

    @property
    def gap(self) -> Tensor:
        """Distance of the outermost groups in standard deviations of the noise, ``[C]``."""
        return (self.means.max(1).values - self.means.min(1).values) / self.variance.sqrt()


def fit_mixture(
    scores: Tensor, prompts: Tensor, start: Tensor, equal_shares: bool = False
) -> SharedMixture:
    """Fit by expectation maximisation.

    Args:
        scores: ``[N, C]``; each column is fitted by itself.
        prompts: int64 ``[N]``.
        start: memberships to start from, ``[N, C, G]``, at least 0, with sum 1 over groups.
        equal_shares: let the groups have the same shares in all prompts, as if the attribute did
            not go along with them.
    """
    values = scores.double() - prompt_means(scores.double(), prompts)[prompts]
    values = values / values.std(0).clamp(min=torch.finfo(torch.float64).tiny)
    centres = prompt_means(values, prompts)
    groups = start.shape[2]
    members = 0.9 * start.double() + 0.1 / groups
    means = torch.einsum("nc,ncg->cg", values, members) / members.sum(0)
    for _ in range(ITERATIONS):
        own_shares = prompt_means(members, prompts)
        shares = members.mean(0).expand_as(own_shares) if equal_shares else own_shares
        shares = shares.clamp(min=LEAST_SHARE)
        # Offsets and means depend on each other; a few turns bring them close enough.
        for _ in range(3):
            offsets = centres - (own_shares * means).sum(2)
            shifted = values - offsets[prompts]
            means = torch.einsum("nc,ncg->cg", shifted, members) / members.sum(0)
        squares = (shifted[..., None] - means).square()
        variance = ((members * squares).sum((0, 2)) / len(values)).clamp(min=LEAST_VARIANCE)
        members, likelihoods = _expectation(shares.log()[prompts], squares, variance[:, None])
    return SharedMixture(likelihoods.sum(0), members, shares, means, variance)


def mixture_gains(scores: Tensor, prompts: Tensor, start: Tensor) -> Tensor:
    """How much better two groups explain each prompt's scores than one, prompt by prompt.

    Args:
        scores: ``[N, C]``.
        prompts: int64 ``[N]``, without gaps.
        start: memberships to start from, ``[N, C, 2]``.

    Returns:
        float64 ``[P, C]``: gain in log-likelihood an image of a mixture of two normal groups of
        the same variance over one, less what its two further parameters are worth by the Bayesian
        information criterion.
    """
    values = scores.double() - prompt_means(scores.double(), prompts)[prompts]
    deviations = prompt_means(values.square(), prompts).sqrt()
    values = values / deviations.clamp(min=torch.finfo(torch.float64).tiny)[prompts]
    members = 0.9 * start.double() + 0.1 / start.shape[2]
    for _ in range(ITERATIONS):
        shares = prompt_means(members, prompts).clamp(min=LEAST_SHARE)
        means = prompt_means(values[..., None] * members, prompts) / shares
        squares = (values[..., None] - means[prompts]).square()
        variances = prompt_means((members * squares).sum(2), prompts).clamp(min=LEAST_VARIANCE)
        members, likelihoods = _expectation(
            shares.log()[prompts], squares, variances[prompts][..., None]
        )
    counts = prompts.bincount().double()[:, None]
    one_group = -0.5 * (1 + log(2 * torch.pi))  # of unit variance, an image
    return prompt_means(likelihoods, prompts) - one_group - counts.log() / counts


def _expectation(log_shares: Tensor, squares: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Memberships ``[N, C, G]`` of normal groups, and log-likelihoods ``[N, C]``.

    Args:
        log_shares: logarithms of the groups' shares, ``[N, C, G]``.
        squares: squared distances to the groups' means, likewise.
        variances: of the groups, to be broadcast.
    """
    logits = log_shares - 0.5 * squares / variances - 0.5 * (2 * torch.pi * variances).log()
    likelihoods = logits.logsumexp(2)
    return (logits - likelihoods[..., None]).exp(), likelihoods
