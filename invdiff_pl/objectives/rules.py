"""Rules that combine group risks, by name: mean plus variance, worst group, plain mean."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.names import require_name


class Rule(nn.Module, ABC):
    """Base class of functions of the group risks ``L_g`` that training lowers.

    All methods take *global* risks, so that results do not depend on how a batch is cut. Groups of
    no mass are absent: their risk is 0 and does not count.
    """

    @abstractmethod
    def gradient(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return the derivative of the rule in each group's risk.

        Args:
            risks: ``[G]``; 0 for an absent group.
            group_weights: ``[G]``, at least 0; 0 for an absent group.

        Returns:
            ``[G]``; 0 for an absent group.
        """

    @abstractmethod
    def value(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return the scalar that the rule aims to lower; held-out risks are compared by it."""

    def observe(self, risks: Tensor, group_weights: Tensor) -> None:
        """Update the rule's state with the risks of one whole batch, once per optimizer step."""


class VariancePenalty(Rule):
    """``mean_g L_g + lambda Var_g L_g`` (arXiv 2412.08480; risk extrapolation, arXiv 2003.00688).

    Args:
        penalty: lambda, at least 0.
        unbiased: use the sample variance, over ``G - 1``; otherwise the population's, over ``G``.
    """

    def __init__(self, penalty: float = 1.0, unbiased: bool = True) -> None:
        super().__init__()
        self.penalty = penalty
        self.unbiased = unbiased

    def gradient(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return ``1/G + 2 lambda (L_g - mean L) / (G - 1)``, or the same over ``G``."""
        groups, deviations = _deviations(risks, group_weights)
        gradient = 1 / groups + 2 * self.penalty * deviations / self._freedom(groups)
        return torch.where(group_weights > 0, gradient, 0.0)

    def value(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return the mean plus the penalised variance over the groups that are present."""
        groups, deviations = _deviations(risks, group_weights)
        return risks.sum() / groups + self.penalty * deviations.square().sum() / self._freedom(
            groups
        )

    def _freedom(self, groups: Tensor) -> Tensor:
        return (groups - 1).clamp(min=1) if self.unbiased else groups


class GroupDro(Rule):
    """The worst group's risk, by online group-DRO (Sagawa et al., arXiv 1911.08731).

    The weights ``q_g`` start even and are multiplied by ``exp(step_size L_g)`` and renormalised
    once per optimizer step; the step then lowers ``sum_g q_g L_g``.

    Args:
        groups: G, the number of groups.
        step_size: step size of the weights.
    """

    log_weights: Tensor

    def __init__(self, groups: int, step_size: float = 0.1) -> None:
        super().__init__()
        self.step_size = step_size
        self.register_buffer("log_weights", torch.zeros(groups))

    def gradient(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return the weights of the groups that are present, updated with this batch's risks."""
        weights = (self.log_weights.to(risks) + self.step_size * risks).masked_fill(
            group_weights == 0, -torch.inf
        )
        return weights.softmax(0)

    def value(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return the worst group's risk."""
        return risks.masked_fill(group_weights == 0, -torch.inf).max()

    def observe(self, risks: Tensor, group_weights: Tensor) -> None:
        """Keep the weights updated with this batch's risks."""
        weights = self.log_weights + self.step_size * risks.to(self.log_weights)
        self.log_weights.copy_(weights.log_softmax(0))


class Reweighting(Rule):
    """``mean_g L_g``: plain re-weighting, in which every group counts the same."""

    def gradient(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return ``1/G``."""
        return (group_weights > 0).to(group_weights) / _present(group_weights)

    def value(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return the mean over the groups that are present."""
        return risks.sum() / _present(group_weights)


class EmpiricalRisk(Rule):
    """The mean loss of all samples: groups count by their mass, that is, not at all."""

    def gradient(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return each group's share of the mass."""
        return group_weights / group_weights.sum()

    def value(self, risks: Tensor, group_weights: Tensor) -> Tensor:
        """Return the mean over samples."""
        return (risks * group_weights).sum() / group_weights.sum()


def _present(group_weights: Tensor) -> Tensor:
    return (group_weights > 0).sum()


def _deviations(risks: Tensor, group_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of groups that are present, and their risks less the mean, ``[G]``."""
    groups = _present(group_weights)
    return groups, torch.where(group_weights > 0, risks - risks.sum() / groups, 0.0)


RULES: dict[str, Callable[..., Rule]] = {
    "variance": lambda groups, penalty: VariancePenalty(penalty),
    "population_variance": lambda groups, penalty: VariancePenalty(penalty, unbiased=False),
    "group_dro": lambda groups, penalty, **rest: GroupDro(groups, **rest),
    "reweighting": lambda groups, penalty: Reweighting(),
    "empirical_risk": lambda groups, penalty: EmpiricalRisk(),
}


def build_rule(name: str, groups: int, penalty: float, **settings: Any) -> Rule:
    """Build the rule of a name.

    Args:
        name: ``variance`` (sample form) or ``population_variance``, the mean plus ``penalty`` times
            the variance of group risks; ``group_dro``; ``reweighting``, the mean of group risks;
            or ``empirical_risk``, the mean over samples.
        groups: G, the number of groups.
        penalty: lambda, at least 0.
        settings: ``step_size`` of ``group_dro``.

    Raises:
        InvDiffError: if there is no such rule, it has no such setting, or lambda is negative.
    """
    require_name("objective", name, tuple(RULES))
    if penalty < 0:
        raise InvDiffError(f"lambda_={penalty}: expected at least 0.", "lambda_")
    try:
        return RULES[name](groups=groups, penalty=penalty, **settings)
    except TypeError:
        raise InvDiffError(
            f"`objective_settings`: {sorted(settings)} are not settings of {name!r}; only "
            "group_dro has one, step_size.",
            "objective_settings",
        ) from None
