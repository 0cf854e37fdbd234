"""Attributes of two values: many starts climbed at once, along a line each.

The model and its derivation are in :mod:`invdiff_pl.environments.hidden_attribute`. With two values
all that matters is ``y = z w``, ``w = Sigma^-1 delta``; since z is white, ``Sigma = I - A delta delta'``
and ``w = delta / (1 - A |delta|^2)`` with ``A = mean_p pi_p (1 - pi_p)``.
"""

from dataclasses import replace

import torch
from torch import Tensor

from invdiff_pl.environments.shared_values import Fit, Space, fit_values, prompt_means

_CLIMBING_STEPS = 20
_FIRST_ROUNDS = 12
_ROUNDS = 60
# Fixed points that are kept, and the cosine from which on two of them are one attribute: along one
# direction prompts' places can be mistaken for shares, and the likelier reading is the right one.
_MOST_FITS = 40
_SAME = 0.9
_STILL_SAME = 0.99  # while they are moving
_MOST_EXPLAINED = 0.98


def two_value_fits(space: Space, starts: int, source: torch.Generator) -> list[Fit]:
    """Distinct fixed points, of most log-likelihood first.

    Args:
        space: of the images.
        starts: number of starting points.
        source: of random directions.
    """
    half = max(starts // 2, 1)
    dimensions = space.values.shape[1]
    # In single precision, which finds the way; the last rounds are in double.
    single = replace(space, values=space.values.float())
    drawn = torch.randn(dimensions, 2 * half, generator=source)
    drawn = drawn / drawn.norm(dim=0)
    directions = torch.cat([_skewed(single, drawn[:, :half]), drawn[:, half:]], dim=1)
    members = _first_memberships(single, directions)
    along = directions.repeat(1, members.shape[1] // directions.shape[1])
    members, delta, _ = _climb(single, members, _FIRST_ROUNDS, along)
    members, delta, likelihood = _climb(single, members, _FIRST_ROUNDS)
    members = members[:, _distinct(delta, likelihood, _STILL_SAME)]
    members, delta, likelihood = _climb(single, members, _ROUNDS)
    kept = _distinct(delta, likelihood)
    return [
        fit_values(space, torch.stack([1 - each, each], dim=1), rounds=2)
        for each in members[:, kept].double().T
    ]


def _skewed(space: Space, directions: Tensor) -> Tensor:
    """Directions ``[D, S]`` climbed to where prompts differ most in bounded skewness."""
    values, prompts = space.values, space.prompts
    weights = (prompts.bincount() / len(prompts)).to(values)[:, None]
    for step in range(_CLIMBING_STEPS):
        line = values @ directions
        deviation = prompt_means(line.square(), prompts).sqrt().clamp(min=1e-6)[prompts]
        bounded = torch.tanh(line / deviation)
        skewness = prompt_means(bounded, prompts)
        apart = skewness - (weights * skewness).sum(0)
        gradient = values.T @ (apart[prompts] * (1 - bounded.square()) / deviation)
        gradient = gradient - (directions * gradient).sum(0) * directions
        rate = 0.8 * (1 - step / _CLIMBING_STEPS)
        directions = directions + rate * gradient / gradient.norm(dim=0).clamp(min=1e-9)
        directions = directions / directions.norm(dim=0)
    return directions


def _first_memberships(space: Space, directions: Tensor) -> Tensor:
    """Each prompt cut at its mean, and twice beyond it in its long tail: ``[N, 3 S]``."""
    line = space.values @ directions
    deviation = prompt_means(line.square(), space.prompts).sqrt()
    skewness = prompt_means(
        torch.tanh(line / deviation.clamp(min=1e-9)[space.prompts]), space.prompts
    )
    # A long upper tail draws the mean upwards, so that most images, and tanh, are below it.
    cut = (torch.where(skewness < 0, 1.0, -1.0) * deviation)[space.prompts]
    parts = [line > 0, line > cut, line > 2 * cut]
    return 0.02 + 0.96 * torch.cat(parts, dim=1).to(line)


def _climb(
    space: Space, members: Tensor, rounds: int, along: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Expectation maximisation of each column.

    Args:
        space: of the images.
        members: probability of the second value, ``[N, S]``.
        rounds: of expectation and maximisation.
        along: unit directions ``[D, S]`` that the values must lie apart in; any if not given.

    Returns:
        memberships ``[N, S]``, what lies between the values ``[D, S]``, and log-likelihood an image
        ``[S]``, over that of one group.
    """
    values, prompts = space.values, space.prompts
    weights = (prompts.bincount() / len(prompts)).to(values)[:, None]
    for _ in range(rounds):
        own = prompt_means(members, prompts).clamp(1e-4, 1 - 1e-4)
        between = (weights * own * (1 - own)).sum(0)
        delta = values.T @ (members - own[prompts]) / len(values) / between
        if along is not None:
            delta = along * (along * delta).sum(0)
        unbounded = between * delta.square().sum(0)
        explained = unbounded.clamp(max=_MOST_EXPLAINED)
        delta = delta * (explained / unbounded.clamp(min=1e-12)).sqrt()
        direction = delta / (1 - explained)
        distance = (delta * direction).sum(0).clamp(min=1e-12)
        line = values @ direction
        low = line + own[prompts] * distance  # from the lower group's place
        members = torch.sigmoid(torch.logit(own)[prompts] + low - distance / 2)
    # Along the line, of variance `distance` within groups and distance / (1 - explained) in all.
    groups = torch.logaddexp(
        torch.log1p(-own)[prompts] - 0.5 * low.square() / distance,
        own.log()[prompts] - 0.5 * (low - distance).square() / distance,
    )
    one = -0.5 * line.square() * (1 - explained) / distance
    return members, delta, (groups - one).mean(0) - 0.5 * torch.log1p(-explained)


def _distinct(delta: Tensor, likelihood: Tensor, same: float = _SAME) -> Tensor:
    """Columns of most log-likelihood, no two of which lie in the same direction."""
    units = delta / delta.norm(dim=0).clamp(min=1e-9)
    alike = (units.T @ units).abs() > same
    kept: list[int] = []
    for column in likelihood.argsort(descending=True).tolist():
        if len(kept) < _MOST_FITS and not alike[column, kept].any():
            kept.append(column)
    return torch.tensor(kept, dtype=torch.long)
