"""Risks of held-out images by timestep bin, which select a checkpoint, and METHOD's bound."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invdiff_pl.objectives.rules import Rule

# Fractional parts of its multiples spread evenly, however many there are.
_GOLDEN = 0.6180339887498949


def timestep_bins(bins: int, train_timesteps: int, places: int) -> tuple[Tensor, Tensor]:
    """Cut timesteps into equal bins, and choose a timestep in each for every place in a cell.

    Returns:
        edges int64 ``[bins + 1]`` and timesteps int64 ``[places, bins]``, spread over each bin.
    """
    edges = (torch.arange(bins + 1) * train_timesteps) // bins
    offsets = (0.5 + _GOLDEN * torch.arange(places, dtype=torch.float64)) % 1
    return edges, edges[:-1] + (offsets[:, None] * edges.diff()).long()


def round_robin(
    prompt_ids: Tensor, assignments: Tensor, rows: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Choose up to ``count`` rows: one of each (prompt, environment), then the next of each.

    Args:
        prompt_ids: int64 ``[N]``.
        assignments: int64 ``[N]``.
        rows: int64, rows of both.
        count: maximum number of rows.

    Returns:
        int64 rows, and the place of each among those of its (prompt, environment), from 0.
    """
    cells = (prompt_ids * (int(assignments.max()) + 1) + assignments)[rows]
    order = cells.argsort(stable=True)
    sizes = cells.bincount()
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(len(rows)) - starts[cells[order]]
    chosen = places.argsort(stable=True)[:count]
    return rows[order[chosen]], places[chosen]


def held_out_weights(prompt_ids: Tensor, memberships: Tensor) -> Tensor:
    """Weigh images in each group's risk so that prompts count alike, as in balanced batches.

    Risks are compared over the prompts that hold every environment, so that a difference between
    environments is not one between prompts; over all prompts if none holds every environment.

    Args:
        prompt_ids: int64 ``[n]``.
        memberships: ``[n, G]``.

    Returns:
        float64 ``[n, G]``; columns sum to 1, or to 0 for a group without images.
    """
    weights = memberships.double()
    group_weights = weights.new_zeros((int(prompt_ids.max()) + 1, weights.shape[1]))
    group_weights.index_add_(0, prompt_ids, weights)
    complete = (group_weights > 0).all(1)
    if complete.any():
        weights = weights * complete[prompt_ids][:, None]
        group_weights = group_weights * complete[:, None]
    weights = weights / group_weights[prompt_ids].clamp(min=torch.finfo(torch.float64).tiny)
    return weights / (group_weights > 0).sum(0).clamp(min=1)


def worst_risk_bound(risks: Tensor) -> Tensor:
    """Bound all risks by ``mean_g L_g + sqrt((G - 1) Var_g L_g)``, with the population variance.

    Args:
        risks: ``[G]``.
    """
    spread = ((len(risks) - 1) * risks.var(correction=0)).sqrt()
    return risks.mean() + spread


@dataclass(frozen=True)
class HeldOutObjective:
    """The training objective on held-out images, as an average over timestep bins.

    Attributes:
        weights: weights of the images in each group's risk, float64 ``[n, G]``, see
            :func:`held_out_weights`.
        cells: int64 ``[n]``, the (prompt, environment) of each image.
        shares: float64 ``[bins]``, how often training draws from each bin.
        rule: rule that combines the risks in each bin.
    """

    weights: Tensor
    cells: Tensor
    shares: Tensor
    rule: Rule

    def value(self, losses: Tensor) -> float:
        """Compute the rule of the group risks in each bin, averaged over bins.

        Args:
            losses: losses as weighted in the objective, float64 ``[n, bins]``.
        """
        group_weights = self.weights.sum(0)
        risks = self.weights.T @ losses
        values = torch.stack([self.rule.value(column, group_weights) for column in risks.T])
        return float(self.shares @ values)

    def standard_error(self, losses: Tensor, others: Tensor) -> float:
        """Estimate the standard error of the difference in value between two sets of weights.

        Both were measured on the same images, timesteps and noises, so it is that of the images'
        differences within their cells, through the objective's gradient at ``others``. An image
        alone in its cell adds nothing.
        """
        group_weights = self.weights.sum(0)
        gradient = [
            self.rule.gradient(column, group_weights) for column in (self.weights.T @ others).T
        ]
        coefficients = self.weights @ torch.stack(gradient, dim=1)
        parts = ((losses - others) * coefficients) @ self.shares
        counts = self.cells.bincount().double()
        means = torch.zeros_like(counts).index_add_(0, self.cells, parts) / counts.clamp(min=1)
        squares = (parts - means[self.cells]).square()
        sums = torch.zeros_like(counts).index_add_(0, self.cells, squares)
        return float((sums * counts / (counts - 1).clamp(min=1)).sum().sqrt())


def bin_figures(losses: Tensor, weights: Tensor) -> dict[str, Any]:
    """Compute one bin's row of the theory table, JSON-ready.

    Args:
        losses: losses of the images in the bin, float64 ``[n]``.
        weights: float64 ``[n, G]``, see :func:`held_out_weights`; groups without images are left
            out.
    """
    weights = weights[:, weights.sum(0) > 0]
    risks = losses @ weights
    variance = risks.var(correction=0)
    within = (losses.square() @ weights - risks.square()).clamp(min=0).mean().sqrt()
    return {
        "risks": risks.tolist(),
        "mean": float(risks.mean()),
        "worst": float(risks.max()),
        "variance": float(variance),
        "bound": float(worst_risk_bound(risks)),
        # How far apart the environments are, in standard deviations of an image's loss.
        "separation": float(variance.sqrt() / within) if within > 0 else 0.0,
    }
