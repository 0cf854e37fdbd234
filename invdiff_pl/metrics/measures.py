"""Formulas of measures of how far the shares of an attribute's classes lie from the wanted ones.

Shares p of K classes are compared with wanted shares q, even ones by default. At K = 2 and even q
most measures are one figure in different units: with Bias B, the fairness discrepancy is
``B / sqrt 2``, the deviation ratio B and the parity gap ``B / 2``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Formula = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Measure:
    """A convex function of shares, least at the wanted shares; or a concave one, largest there.

    Attributes:
        name: short name in snake case.
        title: title in tables.
        formula: function from shares and wanted shares, both float ``[..., K]``, to ``[...]``.
        gradient: gradient of the formula by the shares, ``[..., K]``; a subgradient where there is
            none.
        at_target: value at the wanted shares; 1 means that the measure falls from there.
    """

    name: str
    title: str
    formula: Formula
    gradient: Formula
    at_target: float = 0.0

    @property
    def sign(self) -> int:
        """1 if the measure rises with unevenness, -1 if it falls."""
        return -1 if self.at_target else 1

    def __call__(self, shares: Tensor, target: Tensor | None = None) -> Tensor:
        """Compute the measure.

        Args:
            shares: float ``[..., K]``; rows sum to 1.
            target: wanted shares, of a shape that broadcasts; even ones if not given.

        Returns:
            ``[...]``.

        Example:
            >>> FAIRNESS_DISCREPANCY(torch.tensor([0.9, 0.1]))
            tensor(0.5657)
        """
        return self.formula(shares, even_shares(shares) if target is None else target)


def even_shares(like: Tensor) -> Tensor:
    """Return even shares ``[K]`` of the classes in the last dimension."""
    classes = like.shape[-1]
    return torch.full((classes,), 1 / classes, dtype=like.dtype, device=like.device)


def pairwise_bias(shares: Tensor) -> Tensor:
    """Compute the mean absolute difference between the shares of two classes: InvDiff's Bias.

    ``B = 2 / (K (K - 1)) * sum_{i<j} |p_i - p_j|`` (Hou et al. 2024), by sorting, since the share
    of rank k (from 0, ascending) enters with a net weight of ``2k - K + 1``.

    Args:
        shares: float ``[..., K]``, non-negative, summing to 1 over the last dimension; or
            differences of such shares.

    Returns:
        ``[...]``, in [0, 2/K].
    """
    return shares.sort(dim=-1).values @ bias_contrast(shares)


def bias_contrast(shares: Tensor) -> Tensor:
    """Return the weights ``[K]`` of shares in ascending order whose weighted sum is Bias."""
    classes = shares.shape[-1]
    ranks = torch.arange(classes, dtype=shares.dtype, device=shares.device)
    return (2 * ranks - classes + 1) * 2 / (classes * (classes - 1))


def _bias_gradient(shares: Tensor, target: Tensor) -> Tensor:
    apart = shares - target
    contrast = bias_contrast(apart).expand_as(apart)
    return torch.zeros_like(apart).scatter(-1, apart.argsort(dim=-1), contrast)


def _discrepancy_gradient(shares: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.normalize(shares - target, dim=-1)


def _ratio(shares: Tensor, target: Tensor) -> Tensor:
    return (shares - target).abs().amax(-1) / (1 - target.amin(-1))


def _ratio_gradient(shares: Tensor, target: Tensor) -> Tensor:
    apart = shares - target
    place = apart.abs().argmax(-1, keepdim=True)
    slope = apart.gather(-1, place).sign() / (1 - target.amin(-1, keepdim=True))
    return torch.zeros_like(apart).scatter(-1, place, slope)


def _divergence(shares: Tensor, target: Tensor) -> Tensor:
    shares = shares.clamp(min=0)  # normal approximations of counts fall below
    return torch.special.xlogy(shares, shares / target).sum(-1)


def _divergence_gradient(shares: Tensor, target: Tensor) -> Tensor:
    return (shares / target).clamp(min=torch.finfo(shares.dtype).tiny).log()


def _entropy(shares: Tensor, target: Tensor) -> Tensor:
    # Rounding of a divergence that is the largest possible would go below 0.
    return (1 + _divergence(shares, target) / target.amin(-1).log()).clamp(min=0)


BIAS = Measure(
    "bias", "Bias", lambda shares, target: pairwise_bias(shares - target), _bias_gradient
)
FAIRNESS_DISCREPANCY = Measure(
    "fairness_discrepancy",
    "Fairness discrepancy",
    lambda shares, target: torch.linalg.vector_norm(shares - target, dim=-1),
    _discrepancy_gradient,
)
DEVIATION_RATIO = Measure("deviation_ratio", "Deviation ratio", _ratio, _ratio_gradient)
PARITY_GAP = Measure(
    "parity_gap",
    "Parity gap",
    lambda shares, target: (shares - target).abs().mean(-1),
    lambda shares, target: (shares - target).sign() / shares.shape[-1],
)
KL_DIVERGENCE = Measure("kl", "KL, nats", _divergence, _divergence_gradient)
NORMALIZED_ENTROPY = Measure(
    "normalized_entropy",
    "Normalised entropy",
    _entropy,
    lambda shares, target: _divergence_gradient(shares, target) / target.amin(-1, True).log(),
    at_target=1.0,
)
MEASURES = (
    BIAS,
    FAIRNESS_DISCREPANCY,
    DEVIATION_RATIO,
    PARITY_GAP,
    KL_DIVERGENCE,
    NORMALIZED_ENTROPY,
)
