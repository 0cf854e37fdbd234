"""Group risks, and a loss with the gradient of a rule of them, however the batch is cut.

METHOD: ``L = mean_g L_g + lambda * Var_g L_g`` over the inferred environments (arXiv 2412.08480,
the min step). A :class:`~invdiff_pl.objectives.rules.Rule` combines the risks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.objectives.rules import Rule

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """The objective on one (micro-)batch, and the risks it is made of.

    Attributes:
        loss: scalar whose gradient, averaged over ranks, is that of the global objective. Its
            value is not that of the objective.
        risks: detached group risks over the global batch, ``[G]``, 0 for an absent group.
        group_weights: detached sums of weights over the global batch, ``[G]``.
    """

    loss: Tensor
    risks: Tensor
    group_weights: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean risk of the groups that are present."""
        return self.risks.sum() / (self.group_weights > 0).sum()

    @property
    def variance(self) -> Tensor:
        """Sample variance of the group risks; 0 with fewer than two groups."""
        groups = (self.group_weights > 0).sum()
        deviations = torch.where(self.group_weights > 0, self.risks - self.mean, 0.0)
        return deviations.square().sum() / (groups - 1).clamp(min=1)


def group_sums(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum weighted losses and weights, ``[2, G]``, detached, to be added up over parts of a batch.

    Args:
        losses: per-sample losses ``[B]``.
        weights: membership of each sample in each environment ``[B, G]``, at least 0: one-hot rows
            if assignments are hard, rows of shares if they are soft.
    """
    detached = losses.detach()
    return torch.stack([(weights * detached[:, None]).sum(0), weights.sum(0)])


def group_risks(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return risks and group weights ``[G]`` from :func:`group_sums`; absent groups have risk 0."""
    totals, group_weights = sums
    smallest = torch.finfo(group_weights.dtype).tiny
    return torch.where(
        group_weights > 0, totals / group_weights.clamp(min=smallest), 0.0
    ), group_weights


def group_objective(
    losses: Tensor,
    weights: Tensor,
    rule: Rule,
    sums: Tensor | None = None,
    reduce: Reduce | None = None,
    world_size: int = 1,
) -> Objective:
    """Compute a loss whose gradient is that of a rule of the *global* batch's group risks.

    A variance, or any function of the risks, is not a mean over parts of the batch, but its
    gradient is a weighted sum over samples: with ``W_g = sum_i w_ig``, the risk ``L_g`` and the
    rule's derivative ``r_g`` in it, all of the global batch, the loss ``sum_i c_i l_i`` with
    ``c_i = sum_g r_g w_ig / W_g`` held fixed has exactly the gradient of the rule, however the
    batch is cut into ranks and micro-batches.

    Args:
        losses: per-sample losses ``[B]`` of this part of the batch.
        weights: environment memberships ``[B, G]``, hard or soft.
        rule: rule that combines the risks.
        sums: :func:`group_sums` of the whole global batch, if known beforehand (gradient
            accumulation); otherwise those of this part, added up over ranks by ``reduce``.
        reduce: adds a tensor up over ranks (all-reduce with sum).
        world_size: number of ranks, over which gradients will be averaged.
    """
    if sums is None:
        sums = group_sums(losses, weights)
        if reduce is not None:
            sums = reduce(sums)
    risks, group_weights = group_risks(sums)
    gradient = rule.gradient(risks, group_weights) / group_weights.clamp(
        min=torch.finfo(group_weights.dtype).tiny
    )
    per_sample = (weights * gradient).sum(1).detach()
    return Objective(world_size * (per_sample * losses).sum(), risks, group_weights)
