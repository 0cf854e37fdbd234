"""Fitting values that all prompts have in common, in shares that differ from prompt to prompt.

The model and its derivation are in :mod:`invdiff_pl.environments.hidden_attribute`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.environments.space import CHUNK, Space, prompt_means

ROUNDS = 60
# Each prompt's shares are shrunk towards the mean as by so many images of the mean shares.
_PRIOR_IMAGES = 1.0
LEAST_SHARE = 1e-4
# Least variance of the noise in any direction, relative to z, which has variance 1.
_LEAST_VARIANCE = 0.02


@dataclass(frozen=True)
class Fit:
    """A fixed point of the model.

    Attributes:
        memberships: r, float64 ``[N, K]``; rows sum to 1.
        shares: pi, float64 ``[P, K]``.
        places: m, the prompts' places, float64 ``[P, D]``.
        delta: the values' positions, of mean 0 over images, float64 ``[K, D]``.
        precision: Sigma^-1, the precision of the noise, float64 ``[D, D]``.
        log_likelihood: log-likelihood of each image, in nats, float64 ``[N]``.
    """

    memberships: Tensor
    shares: Tensor
    places: Tensor
    delta: Tensor
    precision: Tensor
    log_likelihood: Tensor

    @property
    def components(self) -> int:
        """Number of leading components that the model is fitted in."""
        return self.delta.shape[1]


def _logits(
    values: Tensor,
    prompts: Tensor,
    places: Tensor,
    shares: Tensor,
    delta: Tensor,
    precision: Tensor,
) -> Tensor:
    """Return the logarithms of the groups' densities ``[N, K]``, up to a constant per image."""
    pulled = delta @ precision
    own = shares.log() - places @ pulled.T - 0.5 * (delta * pulled).sum(1)
    return torch.addmm(own.index_select(0, prompts), values, pulled.T)


def _log_likelihoods(
    values: Tensor,
    prompts: Tensor,
    places: Tensor,
    shares: Tensor,
    delta: Tensor,
    precision: Tensor,
) -> Tensor:
    """Return the log-likelihoods ``[N]`` of values, given the prompts' places."""
    total = _logits(values, prompts, places, shares, delta, precision).logsumexp(1)
    shifted = values - places[prompts]
    constant = 0.5 * (torch.logdet(precision) - values.shape[1] * math.log(2 * math.pi))
    return total + constant - 0.5 * ((shifted @ precision) * shifted).sum(1)


def moderated(own: Tensor, sizes: Tensor) -> Tensor:
    """Return shares ``[P, K]`` from mean memberships, shrunk a little towards the overall mean.

    Args:
        own: mean memberships of each prompt, ``[P, K]``.
        sizes: number of images per prompt, ``[P, 1]``.
    """
    shares = towards_mean(own, sizes).clamp(LEAST_SHARE)
    return shares / shares.sum(1, keepdim=True)


def towards_mean(own: Tensor, sizes: Tensor) -> Tensor:
    """Shrink the means of prompts ``[P, ...]`` a little towards the mean of all images."""
    mean = (own * sizes).sum(0) / sizes.sum()
    return (own * sizes + _PRIOR_IMAGES * mean) / (sizes + _PRIOR_IMAGES)


def maximised(
    values: Tensor, members: Tensor, own: Tensor, sizes: Tensor, covariance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the maximisation step.

    Args:
        values: images' components, float64 ``[N, D]``, of mean 0 in each prompt.
        members: memberships, float64 ``[N, K]``.
        own: mean memberships of each prompt, ``[P, K]``.
        sizes: number of images per prompt, ``[P, 1]``.
        covariance: covariance of ``values``, ``[D, D]``, if it is known.

    Returns:
        ``delta`` ``[K, D]`` and the precision of the noise ``[D, D]``.
    """
    count = len(values)
    mean = (own * sizes).sum(0) / count
    between = mean.diag() - (own * sizes).T @ own / count
    inner = members.T @ values / count
    delta = torch.linalg.pinv(between, rtol=1e-8, hermitian=True) @ inner
    delta = delta - mean @ delta
    noise = (values.T @ values / count if covariance is None else covariance) - inner.T @ delta
    variances, axes = torch.linalg.eigh((noise + noise.T) / 2)
    return delta, (axes / variances.clamp(min=_LEAST_VARIANCE)) @ axes.T


def fit_values(space: Space, start: Tensor, rounds: int = ROUNDS) -> Fit:
    """Run expectation maximisation from memberships ``[N, K]``.

    It stops after ``rounds``, or once no membership moves by 1e-4.
    """
    values, prompts = space.values, space.prompts
    count = int(prompts.max()) + 1
    sizes = prompts.bincount()[:, None].to(values)
    covariance = values.T @ values / len(values)
    members = start.double()
    for _ in range(rounds):
        own = prompt_means(members, prompts, count)
        delta, precision = maximised(values, members, own, sizes, covariance)
        shares, places = moderated(own, sizes), -own @ delta
        updated = _logits(values, prompts, places, shares, delta, precision).softmax(1)
        moved = (updated - members).abs().max()
        members = updated
        if moved < 1e-4:
            break
    likelihood = _log_likelihoods(values, prompts, places, shares, delta, precision)
    return Fit(members, shares, places, delta, precision, likelihood)


@dataclass(frozen=True)
class Reading:
    """A fit's values, as read in images that need not be those they were fitted on.

    Attributes:
        own: shares of the values, float64 ``[P, K]``.
        places: places of the prompts, float64 ``[P, D]``.
        expected: shares that memberships are read with: ``own``, or the same for all prompts.
    """

    own: Tensor
    places: Tensor
    expected: Tensor

    def memberships(self, fit: Fit, values: Tensor, prompts: Tensor) -> Tensor:
        """Return the probabilities of the values, ``[N, K]``."""
        logits = _logits(values, prompts, self.places, self.expected, fit.delta, fit.precision)
        return logits.softmax(1)

    def log_likelihood(self, fit: Fit, values: Tensor, prompts: Tensor) -> float:
        """Return the log-likelihood of all images together, in nats."""
        known = self.places, self.expected, fit.delta, fit.precision
        return float(_log_likelihoods(values, prompts, *known).sum())


def fit_shares(
    fit: Fit,
    values: Tensor,
    prompts: Tensor,
    equal: bool = False,
    rounds: int = ROUNDS,
) -> Reading:
    """Fit shares and places of prompts, given what the values look like.

    Args:
        fit: a fit, which says what the values look like.
        values: images' components, float64 ``[N, D]``, centred by prompt; read in chunks.
        prompts: int64 ``[N]``, without gaps.
        equal: expect the values in the same shares in all prompts; the prompts' places stay free.
        rounds: maximum number of rounds; it stops once no share moves by 1e-4.
    """
    count = int(prompts.max()) + 1
    sizes = prompts.bincount()[:, None].to(values)
    shares = fit.memberships.mean(0).clamp(min=LEAST_SHARE).expand(count, -1)
    if len(fit.shares) == count:
        shares = fit.shares
    expected = shares.mean(0).expand(count, -1) if equal else shares
    now = Reading(shares, -shares @ fit.delta, expected)
    for _ in range(rounds):
        means = shares.new_zeros(shares.shape)
        for rows, some in zip(values.split(CHUNK), prompts.split(CHUNK), strict=True):
            members = now.memberships(fit, rows, some)
            means += prompt_means(members, some, count) * some.bincount(minlength=count)[:, None]
        means = means / sizes
        own = moderated(means, sizes)
        mean = (means * sizes).sum(0) / sizes.sum()
        expected = mean.clamp(min=LEAST_SHARE).expand(count, -1) if equal else own
        moved = torch.cat([own - now.own, expected - now.expected]).abs().max()
        read, now = now, Reading(own, -means @ fit.delta, expected)
        if moved < 1e-4:
            break
    return Reading(now.own, read.places, read.expected)


def gains(fit: Fit, space: Space, parts: Tensor) -> Tensor:
    """Return the log-likelihood per image of the values over one normal distribution, ``[parts]``.

    The latter has the part's own covariance.
    """
    values = space.values
    width = values.shape[1]
    centred = values - prompt_means(values, parts)[parts]
    covariances = prompt_means(centred[:, :, None] * centred[:, None, :], parts)
    covariances = covariances + 1e-6 * torch.eye(width, dtype=values.dtype)
    single = -0.5 * (torch.logdet(covariances) + width * (1 + math.log(2 * math.pi)))
    return prompt_means(fit.log_likelihood, parts) - single


def log_likelihood_ratio(fit: Fit, space: Space) -> float:
    """Return twice the log-likelihood of own over equal shares of the values, at least 0."""
    data = fit, space.values, space.prompts
    own, equal = (fit_shares(*data, equal).log_likelihood(*data) for equal in (False, True))
    return max(2 * (own - equal), 0.0)


def memberships_of(fit: Fit, values: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Read memberships ``[N, K]`` and shares ``[P, K]`` of all images, centred by prompt."""
    present, numbers = prompts.unique(return_inverse=True)
    reading = fit_shares(fit, values, numbers)
    members = torch.cat(
        [
            reading.memberships(fit, rows, some)
            for rows, some in zip(values.split(CHUNK), numbers.split(CHUNK), strict=True)
        ]
    )
    shares = members.new_full((int(prompts.max()) + 1, members.shape[1]), float("nan"))
    shares[present] = reading.own
    return members, shares


def kmeans_memberships(
    values: Tensor, groups: int, source: torch.Generator, rounds: int = 30
) -> Tensor:
    """Return one-hot groups of k-means, float64 ``[N, K]``, started by k-means++."""
    centres = values[torch.randint(len(values), (1,), generator=source)]
    nearest = (values - centres).square().sum(1)
    while len(centres) < groups:
        drawn = torch.multinomial(nearest.clamp(min=1e-12), 1, generator=source)
        centres = torch.cat([centres, values[drawn]])
        nearest = nearest.minimum((values - values[drawn]).square().sum(1))
    for _ in range(rounds):
        assigned = torch.cdist(values, centres).argmin(1)
        centres = prompt_means(values, assigned, groups)
    return one_hot(assigned, groups).double()
