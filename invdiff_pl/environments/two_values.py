"""Attributes of two values: many starts climbed at once, each along a line.

The model and its derivation are in :mod:`invdiff_pl.environments.hidden_attribute`. With two values
all that matters is ``y = z w``, ``w = Sigma^-1 delta``. Since z is white,
``Sigma = I - A delta delta'``, and ``w = delta / (1 - A |delta|^2)`` with
``A = mean_p pi_p (1 - pi_p)``.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from invdiff_pl.environments.lines import log_densities, odds_of
from invdiff_pl.environments.shared_values import Fit, fit_values
from invdiff_pl.environments.space import Space, prompt_means

# Starts are climbed among so many leading components before all: what varies much is found soon.
_FEW_COMPONENTS = (10, 20)
_CLIMBING_STEPS = 20
_LINE_ROUNDS, _FIRST_ROUNDS = 6, 12
_ROUNDS = 60
# Number of fixed points kept, and the cosine from which on two of them are one attribute: along one
# direction, prompts' places can be mistaken for shares, and the likelier reading is the right one.
_MOST_FITS = 60
_SAME = 0.9
_STILL_SAME = 0.99  # while they are moving
_MOST_EXPLAINED = 0.98
# Values among which a prompt's share is searched for anew.
_SHARES = (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.98)


class _Climbed(NamedTuple):
    """Where S starts have led.

    Attributes:
        members: probability of the second value, ``[N, S]``.
        direction: w, the direction that tells the values apart, ``[D, S]``.
        distance: distance of the values along it, which is also the variance within them, ``[S]``.
        likelihood: log-likelihood per image over that of one group, ``[S]``.
    """

    members: Tensor
    direction: Tensor
    distance: Tensor
    likelihood: Tensor


def two_value_fits(space: Space, starts: int, source: torch.Generator) -> list[Fit]:
    """Find the distinct fixed points, those of most log-likelihood first.

    Args:
        space: space of the images.
        starts: number of starting points, each among few, more and all components.
        source: source of random directions.
    """
    # Single precision is enough to find the way; the last rounds are in double precision.
    single = replace(space, values=space.values.float())
    dimensions = space.values.shape[1]
    few = [count for count in _FEW_COMPONENTS if count < dimensions]
    spaces = [*map(single.leading, few), single]
    members = torch.cat([_started(each, starts, source) for each in spaces], dim=1)
    members = _settled(single, members).double() if few else members.double()
    return [fit_values(space, torch.stack([1 - each, each], dim=1), rounds=2) for each in members.T]


def _started(single: Space, starts: int, source: torch.Generator) -> Tensor:
    """Return the memberships ``[N, S]`` of the distinct fixed points that starts lead to."""
    half = max(starts // 2, 1)
    drawn = torch.randn(single.values.shape[1], 2 * half, generator=source)
    drawn = drawn / drawn.norm(dim=0)
    directions = torch.cat([_skewed(single, drawn[:, :half]), drawn[:, half:]], dim=1)
    members = _first_memberships(single, directions)
    along = directions.repeat(1, members.shape[1] // directions.shape[1])
    climbed = _climb(single, members, _LINE_ROUNDS, along)
    members = climbed.members[:, _distinct(climbed, _STILL_SAME)]
    climbed = _climb(single, members, _FIRST_ROUNDS)
    climbed = _climb(single, _reread(single, climbed), _FIRST_ROUNDS)
    return _settled(single, climbed.members[:, _distinct(climbed, _STILL_SAME)])


def _settled(single: Space, members: Tensor) -> Tensor:
    """Return the memberships ``[N, S]`` of the distinct fixed points that ``members`` lead to."""
    climbed = _climb(single, members, _ROUNDS)
    climbed = _climb(single, _reread(single, climbed), _FIRST_ROUNDS)
    return climbed.members[:, _distinct(climbed, _SAME)]


def _skewed(space: Space, directions: Tensor) -> Tensor:
    """Climb directions ``[D, S]`` to where prompts differ most in bounded skewness."""
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
    """Cut each prompt at its mean, and at two points beyond it in its long tail: ``[N, 3 S]``."""
    line = space.values @ directions
    deviation = prompt_means(line.square(), space.prompts).sqrt()
    skewness = prompt_means(
        torch.tanh(line / deviation.clamp(min=1e-9)[space.prompts]), space.prompts
    )
    # A long upper tail pulls the mean upwards, so most images, and the mean tanh, are below it.
    cut = (torch.where(skewness < 0, 1.0, -1.0) * deviation)[space.prompts]
    parts = [line > 0, line > cut, line > 2 * cut]
    return 0.02 + 0.96 * torch.cat(parts, dim=1).to(line)


def _climb(space: Space, members: Tensor, rounds: int, along: Tensor | None = None) -> _Climbed:
    """Run expectation maximisation on each column.

    Args:
        space: space of the images.
        members: probability of the second value, ``[N, S]``.
        rounds: number of rounds of expectation and maximisation.
        along: unit directions ``[D, S]`` along which the values must differ; any if not given.
    """
    values, prompts = space.values, space.prompts
    weights = (prompts.bincount() / len(prompts)).to(values)[:, None]
    for _ in range(rounds):
        own = prompt_means(members, prompts).clamp(1e-4, 1 - 1e-4)
        between = (weights * own * (1 - own)).sum(0)
        # Values have mean 0 in each prompt, so memberships need not be centred.
        delta = values.T @ members / len(values) / between
        if along is not None:
            delta = along * (along * delta).sum(0)
        unbounded = between * delta.square().sum(0)
        explained = unbounded.clamp(max=_MOST_EXPLAINED)
        delta = delta * (explained / unbounded.clamp(min=1e-12)).sqrt()
        direction = delta / (1 - explained)
        distance = (delta * direction).sum(0).clamp(min=1e-12)
        own_logits = torch.logit(own) + (own - 0.5) * distance
        members = torch.addmm(own_logits.index_select(0, prompts), values, direction).sigmoid_()
    line = values @ direction
    low = line + (own * distance)[prompts]
    # Along the line, the variance is `distance` within groups, distance / (1 - explained) in all.
    groups = log_densities(low, prompts, distance, own)
    one = -0.5 * line.square() * (1 - explained) / distance
    likelihood = (groups - one).mean(0) - 0.5 * torch.log1p(-explained)
    return _Climbed(members, direction, distance, likelihood)


def _reread(space: Space, climbed: _Climbed) -> Tensor:
    """Read memberships ``[N, S]`` anew, with each prompt's likeliest share.

    Given the line, a prompt's place follows from its share, which is all that is left to find.
    Rounds of expectation and maximisation may stop at another maximum, where a part of what a
    prompt shows is mistaken for its place.
    """
    line, distance, prompts = space.values @ climbed.direction, climbed.distance, space.prompts
    alike = line.new_ones(int(prompts.max()) + 1, 1)
    likelihoods = []
    for share in _SHARES:
        low = line + share * distance
        densities = log_densities(low, prompts, distance, share * alike)
        likelihoods.append(prompt_means(densities, prompts))
    shares = torch.tensor(_SHARES).to(line)[torch.stack(likelihoods).argmax(0)]
    low = line + (shares * distance)[prompts]
    return torch.sigmoid(odds_of(low, prompts, distance, shares))


def _distinct(climbed: _Climbed, same: float) -> Tensor:
    """Select the columns of most log-likelihood, no two of which lie in the same direction."""
    units = climbed.direction / climbed.direction.norm(dim=0).clamp(min=1e-9)
    alike = (units.T @ units).abs() > same
    kept: list[int] = []
    for column in climbed.likelihood.argsort(descending=True).tolist():
        if len(kept) < _MOST_FITS and not alike[column, kept].any():
            kept.append(column)
    return torch.tensor(kept, dtype=torch.long)
