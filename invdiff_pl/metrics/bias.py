"""How unevenly the samples of each prompt spread over the classes of an attribute."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from invdiff_pl.metrics.correction import corrected_bias
from invdiff_pl.metrics.intervals import bias_interval, mean_bias_interval, pairwise_bias
from invdiff_pl.utils.errors import InvDiffError

_SCALARS = ("mean", "std", "corrected_mean")


class BiasScore(Metric):
    """Bias of generated images: attribute counts per prompt, and what follows from them.

    The only state is the table of counts, summed over ranks, so a rank may see any share of the
    samples, or none. :func:`bias_statistics` lists what ``compute`` returns.

    Args:
        num_prompts: number of prompts P, at least 1.
        num_classes: number of attribute classes K, at least 2.
        confidence: confidence level of the intervals, in (0, 1).
        target: shares that the classes should have, ``[K]`` or ``[P, K]``; even if not given.
        kwargs: further arguments of ``torchmetrics.Metric``.

    Raises:
        InvDiffError: if an argument is out of range.

    Example:
        >>> import torch
        >>> score = BiasScore(num_prompts=1, num_classes=2)
        >>> score.update(torch.zeros(10, dtype=torch.long), torch.tensor([0] * 9 + [1]))
        >>> score.compute()["bias"]
        tensor([0.8000], dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    counts: Tensor

    def __init__(
        self,
        num_prompts: int,
        num_classes: int,
        confidence: float = 0.95,
        target: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, least in (
            ("num_prompts", num_prompts, 1),
            ("num_classes", num_classes, 2),
        ):
            if value < least:
                raise InvDiffError(f"{name} must be at least {least}, not {value}.")
        if not 0 < confidence < 1:
            raise InvDiffError(f"confidence must lie between 0 and 1, not {confidence}.")
        self.num_prompts, self.num_classes = num_prompts, num_classes
        self.confidence = confidence
        self.target = None if target is None else check_target(target, num_prompts, num_classes)
        counts = torch.zeros(num_prompts, num_classes, dtype=torch.long)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, prompts: Tensor, attributes: Tensor) -> None:
        """Count N samples.

        Args:
            prompts: integer ``[N]``, prompt of each sample, in [0, P).
            attributes: integer ``[N]``, attribute class of each sample, in [0, K).

        Raises:
            InvDiffError: if shapes differ, values are no integers or a label is out of range.
        """
        if prompts.shape != attributes.shape or prompts.ndim != 1:
            raise InvDiffError(
                "BiasScore needs one prompt and one attribute per sample, [N] and [N]; "
                f"found shapes {list(prompts.shape)} and {list(attributes.shape)}."
            )
        prompts = self._labels("prompt", prompts, self.num_prompts)
        attributes = self._labels("attribute", attributes, self.num_classes)
        cells = prompts * self.num_classes + attributes
        counts = torch.bincount(cells, minlength=self.counts.numel())
        self.counts += counts.view_as(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """The figures of :func:`bias_statistics` over all samples of all ranks."""
        return bias_statistics(self.counts, self.confidence, self.target)

    def _labels(self, name: str, labels: Tensor, bound: int) -> Tensor:
        if labels.is_floating_point() or labels.is_complex():
            raise InvDiffError(f"{name} labels must be integers, not {labels.dtype}.")
        labels = labels.to(self.counts.device, torch.long)
        outside = labels[(labels < 0) | (labels >= bound)]
        if len(outside) > 0:
            raise InvDiffError(
                f"{name} labels must lie in 0..{bound - 1}, found {int(outside[0])}: check the "
                "labels, or the number of prompts and classes that BiasScore was made with."
            )
        return labels

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        # torchmetrics squeezes tensors of one element: with one prompt, [1] would become [].
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def keep_prompts(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            result = wrapped(*args, **kwargs)
            return {
                name: value if name in _SCALARS or value.ndim else value.reshape(1)
                for name, value in result.items()
            }

        return keep_prompts


def check_target(target: Tensor, num_prompts: int, num_classes: int) -> Tensor:
    """Shares that the classes should have, for every prompt: float64 ``[P, K]`` on the CPU.

    Args:
        target: ``[K]`` or ``[P, K]``.
        num_prompts: P.
        num_classes: K.

    Raises:
        InvDiffError: if the shape is another, or a row is no positive distribution.
    """
    target = target.detach().cpu().double()
    if target.shape not in ((num_classes,), (num_prompts, num_classes)):
        raise InvDiffError(
            f"the target distribution must have shape [{num_classes}] or [{num_prompts}, "
            f"{num_classes}], a share for each attribute class, found {list(target.shape)}."
        )
    if bool((target <= 0).any()) or bool(((target.sum(-1) - 1).abs() > 1e-6).any()):
        raise InvDiffError(
            f"the target distribution must hold positive shares that sum to 1, found "
            f"{target.tolist()}."
        )
    return target.expand(num_prompts, num_classes)


def bias_statistics(
    counts: Tensor, confidence: float = 0.95, target: Tensor | None = None
) -> dict[str, Tensor]:
    """Bias and its relatives from a table of counts.

    Args:
        counts: integer ``[P, K]``, samples per prompt and attribute class.
        confidence: confidence level of the intervals, in (0, 1).
        target: positive shares ``[P, K]`` that the distances are taken to; even ones if not given.

    Returns:
        float64 on the CPU (``counts`` int64); NaN for a prompt without a sample:

        - ``bias [P]``: ``2 / (K (K - 1)) * sum_{i<j} |n_i - n_j| / n`` (Hou et al. 2024), in
          [0, 2/K];
        - ``mean``, ``std``: over the prompts that have samples; population deviation, since the
          prompts are all there are;
        - ``interval [P, 2]``, ``mean_interval [2]``: sampling uncertainty of ``bias`` and ``mean``;
        - ``corrected [P]``, ``corrected_mean``: less what small samples add, see
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
    aim = shares.new_full((classes,), 1 / classes) if target is None else target
    corrected = corrected_bias(counts)
    return {
        "bias": bias,
        "mean": known.mean(),
        "std": known.std(correction=0) if len(known) else bias.new_tensor(torch.nan),
        "interval": bias_interval(counts, confidence),
        "mean_interval": mean_bias_interval(counts, confidence),
        "corrected": corrected,
        "corrected_mean": corrected[~corrected.isnan()].mean(),
        "total_variation": (shares - aim).abs().sum(-1) / 2,
        "kl": torch.special.xlogy(shares, shares / aim).sum(-1),
        "small_sample_bias": small_sample_bias(counts.sum(-1), classes),
        "counts": counts,
    }


def small_sample_bias(samples: Tensor, num_classes: int) -> Tensor:
    """Expected Bias of a perfectly balanced sampler, exactly.

    By linearity it is ``E|n_1 - n_2| / n`` for one pair of classes. ``M ~ Bin(n, 2/K)`` samples
    fall in that pair, and given M the difference is a simple random walk of M steps, whose mean
    distance from the origin is ``M C(M-1, floor((M-1)/2)) / 2^(M-1)``. With K = 2 and large n
    this is about ``0.8 / sqrt(n)``.

    Args:
        samples: integer ``[...]``, number of samples n of each prompt.
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
