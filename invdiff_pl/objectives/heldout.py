"""Risks of held-out images by timestep bin: what selects a checkpoint, and METHOD's bound."""

from typing import Any

import torch
from torch import Tensor


def timestep_bins(bins: int, train_timesteps: int, draws: int) -> tuple[Tensor, Tensor]:
    """Equal bins of timesteps, and the timesteps within each at which risks are measured.

    Returns:
        edges int64 ``[bins + 1]`` and timesteps int64 ``[bins, draws]``, evenly spread in each.
    """
    edges = (torch.arange(bins + 1) * train_timesteps) // bins
    places = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    timesteps = edges[:-1, None] + (places * edges.diff()[:, None]).long()
    return edges, timesteps


def round_robin(prompt_ids: Tensor, assignments: Tensor, rows: Tensor, count: int) -> Tensor:
    """At most ``count`` of ``rows``: one of each (prompt, environment), then the next of each.

    Args:
        prompt_ids: int64 ``[N]``.
        assignments: int64 ``[N]``.
        rows: int64, into both.
        count: at most so many.

    Returns:
        int64 rows, ascending.
    """
    cells = (prompt_ids * (int(assignments.max()) + 1) + assignments)[rows]
    order = cells.argsort(stable=True)
    sizes = cells.bincount()
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(len(rows)) - starts[cells[order]]
    chosen = order[places.argsort(stable=True)[:count]]
    return rows[chosen].sort().values


def held_out_weights(prompt_ids: Tensor, memberships: Tensor) -> Tensor:
    """Weights of images in each group's risk: prompts count alike, as in balanced batches.

    Risks are compared over the prompts that hold every environment, so that a difference between
    environments is none between prompts; over all prompts if none holds them all.

    Args:
        prompt_ids: int64 ``[n]``.
        memberships: ``[n, G]``.

    Returns:
        float64 ``[n, G]``; columns sum to 1, or to 0 where a group has no image.
    """
    weights = memberships.double()
    masses = weights.new_zeros((int(prompt_ids.max()) + 1, weights.shape[1]))
    masses.index_add_(0, prompt_ids, weights)
    complete = (masses > 0).all(1)
    if complete.any():
        weights = weights * complete[prompt_ids][:, None]
        masses = masses * complete[:, None]
    weights = weights / masses[prompt_ids].clamp(min=torch.finfo(torch.float64).tiny)
    return weights / (masses > 0).sum(0).clamp(min=1)


def worst_risk_bound(risks: Tensor) -> Tensor:
    """``mean_g L_g + sqrt((G - 1) Var_g L_g)`` with the population variance: no risk is above it.

    Args:
        risks: ``[G]``.
    """
    spread = ((len(risks) - 1) * risks.var(correction=0)).sqrt()
    return risks.mean() + spread


def bin_figures(risks: Tensor, squares: Tensor) -> dict[str, Any]:
    """One bin's row of the theory table, JSON-ready.

    Args:
        risks: of the groups that are there, ``[G]``.
        squares: the same of squared losses.
    """
    variance = risks.var(correction=0)
    within = (squares - risks.square()).clamp(min=0).mean().sqrt()
    return {
        "risks": risks.tolist(),
        "mean": float(risks.mean()),
        "worst": float(risks.max()),
        "variance": float(variance),
        "bound": float(worst_risk_bound(risks)),
        # How far apart the environments are, in standard deviations of an image's loss.
        "separation": float(variance.sqrt() / within) if within > 0 else 0.0,
    }
