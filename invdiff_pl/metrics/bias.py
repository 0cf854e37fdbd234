"""How unevenly the samples of each prompt spread over the classes of an attribute."""

import math

import torch
from torch import Tensor

from invdiff_pl.metrics.correction import corrected_bias
from invdiff_pl.metrics.counts import AttributeCounts
from invdiff_pl.metrics.intervals import mean_share_interval, share_interval
from invdiff_pl.metrics.measures import (
    DEVIATION_RATIO,
    FAIRNESS_DISCREPANCY,
    KL_DIVERGENCE,
    NORMALIZED_ENTROPY,
    PARITY_GAP,
    Measure,
    pairwise_bias,
)


class BiasScore(AttributeCounts):
    """Bias of generated images: attribute counts per prompt, and what follows from them.

    :func:`bias_statistics` lists what ``compute`` returns. The arguments are those of
    :class:`~invdiff_pl.metrics.counts.AttributeCounts`.

    Example:
        >>> import torch
        >>> score = BiasScore(num_prompts=1, num_classes=2)
        >>> score.update(torch.zeros(10, dtype=torch.long), torch.tensor([0] * 9 + [1]))
        >>> score.compute()["bias"]
        tensor([0.8000], dtype=torch.float64)

    Old men and young women only, balanced over age and over gender:

        >>> score = BiasScore(num_prompts=1, num_classes=(2, 2))
        >>> gender = torch.tensor([0, 1] * 10)
        >>> score.update(torch.zeros(20, dtype=torch.long), gender, gender)
        >>> score.compute()["counts"]
        tensor([[10,  0,  0, 10]])
    """

    def compute(self) -> dict[str, Tensor]:
        """Compute the figures of :func:`bias_statistics` over all samples of all ranks."""
        return bias_statistics(self.counts, self.confidence, self.target)


class ShareMeasure(AttributeCounts):
    """One measure of the samples' shares, with intervals; see the classes below.

    ``compute`` gives float64 tensors on the CPU, NaN for a prompt without a sample: ``value [P]``
    and ``interval [P, 2]`` by prompt, ``mean`` and ``mean_interval [2]`` over prompts. The
    arguments are those of :class:`~invdiff_pl.metrics.counts.AttributeCounts`.
    """

    measure: Measure

    def compute(self) -> dict[str, Tensor]:
        """Compute the measure over all samples of all ranks."""
        return measured(self.counts, self.measure, self.confidence, self.target)


class FairnessDiscrepancy(ShareMeasure):
    """Distance to the wanted shares, ``|p - q|_2``; Bias over the root of 2 for two even classes.

    SelfDebias (arXiv 2512.03749) computes it from shares that are means of a classifier's softmax;
    here each sample counts for one class.

    Example:
        >>> import torch
        >>> score = FairnessDiscrepancy(num_prompts=1, num_classes=2)
        >>> score.update(torch.zeros(10, dtype=torch.long), torch.tensor([0] * 9 + [1]))
        >>> score.compute()["value"]
        tensor([0.5657], dtype=torch.float64)
    """

    measure = FAIRNESS_DISCREPANCY


class DeviationRatio(ShareMeasure):
    """Largest deviation from the wanted shares over the largest possible one, in [0, 1].

    ``max_c |p_c - q_c| / (1 - min_c q_c)``; equal to Bias for two even classes. InterpretDiffusion
    and UCE report it on the WinoBias professions.
    """

    measure = DEVIATION_RATIO


class ParityGap(ShareMeasure):
    """Mean deviation from the wanted shares, ``sum_c |p_c - q_c| / K``.

    Half of Bias for two even classes. EquiSteer (arXiv 2607.01147) reports it.
    """

    measure = PARITY_GAP


class KLDivergence(ShareMeasure):
    """Kullback-Leibler divergence of the shares from the wanted ones, in nats, as in ITI-GEN."""

    measure = KL_DIVERGENCE


class NormalizedEntropy(ShareMeasure):
    """Entropy of the shares over that of even shares, in [0, 1]; 1 is even.

    For other wanted shares q, it is 1 minus the divergence from them over the largest possible one,
    ``1 - KL(p || q) / max_c log(1 / q_c)``, which agrees with the former for even shares.
    """

    measure = NORMALIZED_ENTROPY
    higher_is_better = True


def measured(
    counts: Tensor, measure: Measure, confidence: float = 0.95, target: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute a measure of the shares in a table of counts, with intervals.

    :class:`ShareMeasure` describes the result.

    Args:
        counts: integer ``[P, K]``, samples per prompt and attribute class.
        measure: one of :mod:`invdiff_pl.metrics.measures`.
        confidence: confidence level of the intervals, in (0, 1).
        target: wanted shares ``[P, K]``, positive; even ones if not given.

    Returns:
        ``value [P]``, ``interval [P, 2]``, ``mean`` and ``mean_interval [2]``.
    """
    counts = counts.cpu()
    values = measure(counts / counts.sum(-1, keepdim=True).double(), target)
    return {
        "value": values,
        "interval": share_interval(counts, confidence, measure, target),
        "mean": values[~values.isnan()].mean(),
        "mean_interval": mean_share_interval(counts, confidence, measure, target),
    }


def bias_statistics(
    counts: Tensor, confidence: float = 0.95, target: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute Bias and related figures from a table of counts.

    Args:
        counts: integer ``[P, K]``, samples per prompt and attribute class.
        confidence: confidence level of the intervals, in (0, 1).
        target: shares ``[P, K]`` to which distances are measured, positive; even ones if not given.

    Returns:
        float64 on the CPU (``counts`` int64); NaN for a prompt without a sample:

        - ``bias [P]``: ``2 / (K (K - 1)) * sum_{i<j} |n_i - n_j| / n`` (Hou et al. 2024), in
          [0, 2/K];
        - ``mean``, ``std``: mean and standard deviation over the prompts that have samples; the
          population deviation, since the prompts are all there are;
        - ``interval [P, 2]``, ``mean_interval [2]``: sampling uncertainty of ``bias`` and ``mean``;
        - ``corrected [P]``, ``corrected_mean``: Bias less what small samples add, see
          :func:`~invdiff_pl.metrics.correction.corrected_bias`;
        - ``total_variation [P]``: distance to the target, in [0, 1];
        - ``kl [P]``: Kullback-Leibler divergence from the target in nats, at least 0;
        - ``small_sample_bias [P]``: what a perfectly balanced sampler shows on average at this n;
        - ``counts [P, K]``.
    """
    counts = counts.cpu()
    n = counts.sum(-1, keepdim=True).double()
    shares = counts / n
    bias = pairwise_bias(shares)
    known = bias[~bias.isnan()]
    classes = counts.shape[-1]
    corrected = corrected_bias(counts)
    return {
        "bias": bias,
        "mean": known.mean(),
        "std": known.std(correction=0) if len(known) else bias.new_tensor(torch.nan),
        "interval": share_interval(counts, confidence),
        "mean_interval": mean_share_interval(counts, confidence),
        "corrected": corrected,
        "corrected_mean": corrected[~corrected.isnan()].mean(),
        "total_variation": PARITY_GAP(shares, target) * classes / 2,
        "kl": KL_DIVERGENCE(shares, target),
        "small_sample_bias": small_sample_bias(counts.sum(-1), classes),
        "counts": counts,
    }


def small_sample_bias(samples: Tensor, num_classes: int) -> Tensor:
    """Compute the expected Bias of a perfectly balanced sampler, exactly.

    By linearity it is ``E|n_1 - n_2| / n`` for one pair of classes. ``M ~ Bin(n, 2/K)`` samples
    fall in that pair, and given M the difference is a simple random walk of M steps, whose mean
    distance from the origin is ``M C(M-1, floor((M-1)/2)) / 2^(M-1)``. With K = 2 and large n
    this is about ``0.8 / sqrt(n)``.

    Args:
        samples: integer ``[...]``, number n of samples per prompt.
        num_classes: number of classes K, at least 2.

    Returns:
        float64 of the shape of ``samples``; NaN where n is 0.
    """
    distinct, inverse = samples.unique(return_inverse=True)
    n = distinct.double()[:, None]
    steps = torch.arange(1, int(distinct.max()) + 1, device=samples.device).double()
    rest = n - steps
    share = 2 / num_classes
    log_binomial = (
        _log_choose(n, steps)
        + steps * math.log(share)
        + torch.special.xlogy(rest, torch.full_like(rest, 1 - share))
    )
    half = ((steps - 1) / 2).floor()
    distance = steps.log() + _log_choose(steps - 1, half) - (steps - 1) * math.log(2)
    terms = torch.where(rest < 0, 0.0, (log_binomial + distance).exp())
    return (terms.sum(-1) / n[:, 0])[inverse]


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
