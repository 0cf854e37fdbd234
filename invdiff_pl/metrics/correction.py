"""Corrections for what inflates a Bias: few samples, and a classifier that errs.

Corrected figures stand beside the plain ones under names of their own; they never replace them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.metrics.intervals import mean_share_interval, normal_quantile, share_interval
from invdiff_pl.metrics.measures import bias_contrast, pairwise_bias
from invdiff_pl.utils.errors import InvDiffError

_BISECTIONS = 40
_LARGEST_CONDITION = 100.0  # of a confusion matrix that is inverted


def corrected_bias(counts: Tensor) -> Tensor:
    """Compute Bias less what small samples add to it.

    The mean of ``|n_i - n_j| / n`` is above the true difference, most of all near balance. Each
    pair of classes is given the difference whose expected plug-in estimate is the one observed, or
    zero if even balance would be expected to show more. The expectation is that of a folded normal
    distribution with the variance of a multinomial difference, ``(p_i + p_j - d^2) / n``. Since the
    result is never negative, some 60 % of the inflation remains at exact balance; at a true Bias of
    0.04 and n = 256, a tenth does.

    Args:
        counts: integer ``[..., K]``, samples per attribute class.

    Returns:
        float64 ``[...]``, in [0, plain Bias]; NaN without a sample.
    """
    counts = counts.double()
    n = counts.sum(-1, keepdim=True)
    shares = counts / n
    classes = counts.shape[-1]
    first, second = torch.triu_indices(classes, classes, offset=1)
    observed = (shares[..., first] - shares[..., second]).abs()
    mass = shares[..., first] + shares[..., second]
    low, high = torch.zeros_like(observed), observed.clone()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        beyond = _folded_mean(middle, (mass - middle.square()).clamp(min=0) / n) > observed
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    # Where even balance is expected to show more, the bisection has run down to zero.
    return torch.where(observed.isnan(), observed, low).mean(-1)


def _folded_mean(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the mean of ``|X|`` for normal X."""
    spread = variance.sqrt().clamp(min=1e-12)
    ratio = mean / spread
    tail = math.sqrt(2 / math.pi) * (-ratio.square() / 2).exp()
    return spread * tail + mean * torch.erf(ratio / math.sqrt(2))


@dataclass(frozen=True)
class CorrectedRates:
    """Attribute shares corrected for the classifier's errors, and their Bias.

    Attributes:
        shares: float64 ``[P, K]``, shares of the attribute classes; NaN for a prompt without a
            sample.
        bias: float64 ``[P]``, Bias of each prompt.
        mean: float64 scalar, mean Bias over prompts that have samples.
        interval: float64 ``[P, 2]``, interval of ``bias``.
        mean_interval: float64 ``[2]``, interval of ``mean``.
    """

    shares: Tensor
    bias: Tensor
    mean: Tensor
    interval: Tensor
    mean_interval: Tensor


def correct_for_classifier(
    counts: Tensor, confusion: Tensor, confidence: float = 0.95
) -> CorrectedRates:
    """Estimate the true attribute rates from the counts of a fallible classifier.

    With ``M[i, j]`` the probability that class i is called j, estimated on held-out images, the
    rates r at which classes are called and the true rates p are related by ``r = M^T p``
    (Rogan and Gladen 1978, for K = 2). The inverse is projected onto the simplex. Intervals cover
    the sampling error of the counts and that of M, which all prompts share, by the delta method:
    the total variance gives a number of perfectly classified samples with the same variance, at
    which the intervals of :mod:`~invdiff_pl.metrics.intervals` are taken, so that they stay valid
    near balance; the upper end is at least that of the linear contrast which Bias is in the order
    of the classes. For the simulated coverage of 95 % intervals, see
    ``tests/metrics/test_correction.py``.

    It is assumed that the classifier errs on generated images as it does on the held-out ones, and
    in the same way under every prompt.

    Args:
        counts: integer ``[P, K]``, samples per prompt and class as called by the classifier.
        confusion: integer ``[K, K]``, held-out images by true class (rows) and called class.
        confidence: confidence level in (0, 1).

    Returns:
        the corrected rates and their Bias.

    Raises:
        InvDiffError: if the matrix has another shape, a class has no held-out image, or the
            classifier hardly tells the classes apart.
    """
    counts, confusion = counts.cpu().double(), confusion.cpu().double()
    classes = counts.shape[-1]
    held_out = confusion.sum(-1)
    if confusion.shape != (classes, classes) or bool((held_out == 0).any()):
        raise InvDiffError(
            f"correcting for the classifier's errors takes a [{classes}, {classes}] table of "
            "held-out images with every class in it: rerun the classifier stage."
        )
    rates = confusion / held_out[:, None]
    if float(torch.linalg.cond(rates)) > _LARGEST_CONDITION:
        raise InvDiffError(
            "the classifier hardly tells the attribute's classes apart on held-out images, so its "
            "errors cannot be corrected for: train it on more labelled images."
        )
    inverse = torch.linalg.inv(rates)
    n = counts.sum(-1)
    known = n > 0
    shares = torch.full_like(counts, torch.nan)
    shares[known] = _onto_simplex(counts[known] / n[known, None] @ inverse)
    bias = pairwise_bias(shares)
    interval = torch.full((len(counts), 2), torch.nan, dtype=torch.float64)
    covariances = _Covariances(shares[known], n[known], rates, held_out, inverse)
    interval[known] = covariances.intervals(confidence)
    return CorrectedRates(
        shares, bias, bias[known].mean(), interval, covariances.mean_interval(confidence)
    )


class _Covariances:
    """Covariances of corrected shares: parts due to the counts and to the matrix."""

    def __init__(
        self, shares: Tensor, n: Tensor, rates: Tensor, held_out: Tensor, inverse: Tensor
    ) -> None:
        self.shares, self.n = shares, n
        # Half a count is added to each class: one that was never called has a variance, too.
        told = _smooth((shares @ rates) * n[:, None])
        rows = _multinomial_covariance(_smooth(rates * held_out[:, None])) / held_out[:, None, None]
        of_counts = _multinomial_covariance(told) / n[:, None, None]
        of_rates = torch.einsum("pk,kij->pij", shares.square(), rows)
        self.sampling = inverse.mT @ of_counts @ inverse
        self.shared = inverse.mT @ of_rates @ inverse

    def intervals(self, confidence: float) -> Tensor:
        """Return the intervals of each prompt's Bias, ``[P, 2]``."""
        ends = share_interval(self._weighed(self.sampling + self.shared), confidence)
        spread = self._contrast_variance(self.sampling + self.shared).sqrt()
        return self._raise_upper(ends, pairwise_bias(self.shares), spread, confidence)

    def mean_interval(self, confidence: float) -> Tensor:
        """Return the interval of the mean Bias, ``[2]``; the matrix's errors do not average out."""
        count = len(self.shares)
        ends = mean_share_interval(self._weighed(self.sampling + count * self.shared), confidence)
        independent = self._contrast_variance(self.sampling).sum() / count**2
        common = self._contrast_variance(self.shared).sqrt().mean().square()
        mean = pairwise_bias(self.shares).mean()
        return self._raise_upper(ends, mean, (independent + common).sqrt(), confidence)

    def _weighed(self, covariance: Tensor) -> Tensor:
        """Return counts of perfectly classified samples of the same total variance, ``[P, K]``."""
        smooth = _smooth(self.shares * self.n[:, None])
        total = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        effective = (1 - smooth.square().sum(-1)) / total
        return self.shares * torch.minimum(effective, self.n)[:, None]

    def _contrast_variance(self, covariance: Tensor) -> Tensor:
        order = self.shares.argsort(dim=-1)
        weights = torch.zeros_like(self.shares)
        weights.scatter_(-1, order, bias_contrast(self.shares).expand_as(order))
        return torch.einsum("pi,pij,pj->p", weights, covariance, weights).clamp(min=0)

    def _raise_upper(self, ends: Tensor, bias: Tensor, spread: Tensor, confidence: float) -> Tensor:
        most = 2 / self.shares.shape[-1]
        reached = (bias + normal_quantile(confidence) * spread).clamp(max=most)
        return torch.stack([ends[..., 0], torch.maximum(ends[..., 1], reached)], dim=-1)


def _smooth(counts: Tensor) -> Tensor:
    raised = counts + 0.5
    return raised / raised.sum(-1, keepdim=True)


def _multinomial_covariance(shares: Tensor) -> Tensor:
    return torch.diag_embed(shares) - shares[..., :, None] * shares[..., None, :]


def _onto_simplex(values: Tensor) -> Tensor:
    """Return the nearest distributions to ``values [P, K]`` (Duchi et al. 2008)."""
    ordered = values.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, values.shape[-1] + 1, dtype=values.dtype)
    excess = (ordered.cumsum(-1) - 1) / ranks
    support = (ordered > excess).sum(-1, keepdim=True).clamp(min=1)
    return (values - excess.gather(-1, support - 1)).clamp(min=0)
