"""The invariant objective: mean group risk plus a penalty on the spread of group risks.

METHOD: ``L = mean_g L_g + lambda * Var_g L_g`` over the inferred environments (arXiv 2412.08480,
the min step; risk extrapolation of Krueger et al., arXiv 2003.00688).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """Value of the objective on one (micro-)batch and what it is made of.

    Attributes:
        loss: scalar whose gradient, averaged over ranks, is that of the global objective. Its
            value is not the objective's.
        risks: detached group risks over the global batch, ``[G]``, NaN for an absent group.
        mean: detached mean group risk.
        variance: detached sample variance of the group risks; 0 with fewer than two groups.
    """

    loss: Tensor
    risks: Tensor
    mean: Tensor
    variance: Tensor


def group_sums(losses: Tensor, weights: Tensor) -> Tensor:
    """What ranks and micro-batches add up: weighted losses and weights, ``[2, G]``, detached.

    Args:
        losses: per-sample losses ``[B]``.
        weights: membership of each sample in each environment ``[B, G]``, at least 0.
    """
    detached = losses.detach()
    return torch.stack([(weights * detached[:, None]).sum(0), weights.sum(0)])


def invariant_objective(
    losses: Tensor,
    weights: Tensor,
    penalty: float,
    sums: Tensor | None = None,
    reduce: Reduce | None = None,
    world_size: int = 1,
) -> Objective:
    """Mean group risk plus ``penalty`` times the sample variance of group risks.

    The variance of a whole batch is not a mean over parts of it, but its gradient is a weighted
    sum over samples: with ``W_g = sum_i w_ig`` and ``L_g`` of the *global* batch, the loss
    ``sum_i c_i l_i`` with ``c_i = sum_g [1/G + 2 penalty (L_g - mean L)/(G - 1)] w_ig / W_g``
    held fixed has the gradient of the objective exactly, on any cut into ranks and micro-batches.

    Args:
        losses: per-sample losses ``[B]`` of this part of the batch.
        weights: environment memberships ``[B, G]``.
        penalty: lambda, at least 0.
        sums: :func:`group_sums` of the whole global batch, if known beforehand (gradient
            accumulation); otherwise those of this part, added up over ranks by ``reduce``.
        reduce: adds a tensor up over ranks (all-reduce with sum).
        world_size: number of ranks, over which gradients will be averaged.
    """
    if sums is None:
        sums = group_sums(losses, weights)
        if reduce is not None:
            sums = reduce(sums)
    totals, masses = sums
    present = masses > 0
    risks = torch.where(present, totals / masses.clamp(min=torch.finfo(masses.dtype).tiny), 0.0)
    groups = present.sum()
    mean = risks.sum() / groups
    deviations = torch.where(present, risks - mean, 0.0)
    freedom = (groups - 1).clamp(min=1)
    slopes = torch.where(present, 1 / groups + 2 * penalty * deviations / freedom, 0.0)
    per_sample = (weights * (slopes / masses.clamp(min=torch.finfo(masses.dtype).tiny))).sum(1)
    return Objective(
        loss=world_size * (per_sample.detach() * losses).sum(),
        risks=risks.masked_fill(~present, torch.nan),
        mean=mean,
        variance=deviations.square().sum() / freedom,
    )
