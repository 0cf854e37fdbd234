"""Values that all prompts share, in shares of each prompt's own: whitening and fitting.

The model and its derivation are in :mod:`invdiff_pl.environments.hidden_attribute`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

ROUNDS = 60
# Images that are read at once where all are turned into components.
_CHUNK = 65536
# Images of the mean share that each prompt's own shares are drawn towards.
_PRIOR_IMAGES = 1.0
_LEAST_SHARE = 1e-4
# Least variance of the noise in any direction, where z has variance 1.
_LEAST_VARIANCE = 0.02


def prompt_means(values: Tensor, prompts: Tensor, count: int | None = None) -> Tensor:
    """Mean of each prompt's rows ``[P, ...]``; 0 for a prompt without any."""
    count = int(prompts.max()) + 1 if count is None else count
    sizes = prompts.bincount(minlength=count).clamp(min=1).to(values)
    sums = values.new_zeros((count, *values.shape[1:])).index_add_(0, prompts, values)
    return sums / sizes.reshape(-1, *[1] * (values.dim() - 1))


@dataclass(frozen=True)
class Space:
    """Images on the leading principal components of what varies within prompts.

    Attributes:
        values: float64 ``[N, D]``, of mean 0 in each prompt and covariance I within prompts.
        prompts: int64 ``[N]``, without gaps.
        offsets: of the prompts' means from the mean of all, float64 ``[P, D]``.
        axes: of the components, float64 ``[F, D]``: ``(features - prompt's mean) @ axes``.
    """

    values: Tensor
    prompts: Tensor
    offsets: Tensor
    axes: Tensor

    @property
    def uncentred(self) -> Tensor:
        """Values with what prompts differ in, ``[N, D]``."""
        return self.values + self.offsets[self.prompts]

    def rows(self, chosen: Tensor) -> "Space":
        """Some of the images, centred by themselves."""
        prompts, numbers = self.prompts[chosen].unique(return_inverse=True)
        values = self.values[chosen]
        values = values - prompt_means(values, numbers)[numbers]
        return Space(values, numbers, self.offsets[prompts], self.axes)

    def dealt(self, source: torch.Generator, places: Tensor) -> "Space":
        """Images as if prompts differed in their places only: residuals dealt over prompts anew.

        Args:
            source: of the order.
            places: of the prompts, as fitted, float64 ``[P, D]``.
        """
        sizes = self.prompts.bincount().clamp(min=2).double()
        # Residuals of a small prompt are too short, since its mean is its own images'.
        residuals = self.values * (sizes / (sizes - 1)).sqrt()[self.prompts][:, None]
        residuals = residuals - places[self.prompts]
        residuals = residuals[torch.randperm(len(residuals), generator=source)]
        found = whiten(residuals, self.prompts, residuals.shape[1], standardise=False)
        if found is None:
            return self
        return Space(found.values, self.prompts, self.offsets @ found.axes, found.axes)

    def of(self, features: Tensor, prompts: Tensor) -> Tensor:
        """Components of all images, centred by prompt: ``[N, D]`` of ``features`` ``[N, F]``."""
        parts = [part.double() @ self.axes for part in features.split(_CHUNK)]
        values = torch.cat(parts)
        return values - prompt_means(values, prompts)[prompts]


def whiten(
    features: Tensor, prompts: Tensor, components: int, standardise: bool = True
) -> Space | None:
    """The space of the leading components of features that are centred by prompt.

    Args:
        features: ``[N, F]``.
        prompts: int64 ``[N]``, without gaps.
        components: D, at most.
        standardise: give all features the same variance within prompts first.

    Returns:
        ``None`` where features do not vary within prompts.
    """
    values = features.double()
    means = prompt_means(values, prompts)
    centred = values - means[prompts]
    free = max(len(values) - len(means), 1)
    deviations = (centred.square().sum(0) / free).sqrt()
    scale = torch.where(deviations > 1e-9, 1 / deviations.clamp(min=1e-9), 0.0)
    if not standardise:
        scale = torch.ones_like(scale)
    centred = centred * scale
    variances, axes = torch.linalg.eigh(centred.T @ centred / free)
    kept = min(components, int((variances > 1e-9 * variances.max().clamp(min=1e-9)).sum()), free)
    if kept == 0 or variances.max() <= 1e-9:
        return None
    variances, axes = variances.flip(0)[:kept], axes.flip(1)[:, :kept]
    axes = scale[:, None] * axes / variances.sqrt()
    offsets = (means - values.mean(0)) @ axes
    return Space((centred / scale.clamp(min=1e-30)) @ axes, prompts, offsets, axes)


@dataclass(frozen=True)
class Fit:
    """A fixed point of the model.

    Attributes:
        memberships: float64 ``[N, K]``, rows with sum 1.
        shares: float64 ``[P, K]``.
        places: m, of the prompts, float64 ``[P, D]``.
        delta: of the values, of mean 0 over images, float64 ``[K, D]``.
        precision: of the noise, float64 ``[D, D]``.
        log_likelihood: natural logarithm of each image's, float64 ``[N]``.
    """

    memberships: Tensor
    shares: Tensor
    places: Tensor
    delta: Tensor
    precision: Tensor
    log_likelihood: Tensor

    def gains(self, space: Space, parts: Tensor) -> Tensor:
        """Log-likelihood an image of the groups over one, part by part, ``[parts]``.

        Of two values along the line that tells them apart; of more in all components. The one group
        has the part's own variance or covariance.
        """
        if len(self.delta) > 2:
            single = _own_normal(space.values, parts)
            return prompt_means(self.log_likelihood - single, parts)
        direction = self.precision @ (self.delta[1] - self.delta[0])
        line = (space.values @ direction)[:, None]
        apart = (self.delta @ direction)[:, None]
        width = (self.delta[1] - self.delta[0]) @ direction
        precision = (1 / width.clamp(min=1e-12)).reshape(1, 1)
        places = (self.places @ direction)[:, None]
        _, likelihood = _expectation(line, space.prompts, places, self.shares, apart, precision)
        return prompt_means(likelihood - _own_normal(line, parts), parts)


def _own_normal(values: Tensor, parts: Tensor) -> Tensor:
    """Log-likelihood ``[N]`` of one normal distribution a part, of its own covariance."""
    count, width = int(parts.max()) + 1, values.shape[1]
    ridge = 1e-6 * torch.eye(width, dtype=values.dtype)
    found = values.new_zeros(count)
    for part in range(count):
        own = values[parts == part]
        own = own - own.mean(0)
        covariance = own.T @ own / len(own) + ridge
        found[part] = -0.5 * (torch.logdet(covariance) + width * (1 + math.log(2 * math.pi)))
    return found[parts]


def _expectation(
    values: Tensor,
    prompts: Tensor,
    places: Tensor,
    shares: Tensor,
    delta: Tensor,
    precision: Tensor,
) -> tuple[Tensor, Tensor]:
    """Memberships ``[N, K]`` and log-likelihoods ``[N]`` of values, given prompts' places."""
    shifted = values - places[prompts]
    pulled = delta @ precision
    logits = shifted @ pulled.T - 0.5 * (delta * pulled).sum(1) + shares.log()[prompts]
    total = logits.logsumexp(1)
    width = values.shape[1]
    constant = 0.5 * (torch.logdet(precision) - width * math.log(2 * math.pi))
    likelihood = total + constant - 0.5 * ((shifted @ precision) * shifted).sum(1)
    return (logits - total[:, None]).exp(), likelihood


def _shares(memberships: Tensor, prompts: Tensor, count: int) -> Tensor:
    """Shares ``[P, K]`` from memberships; each prompt's own, drawn a little towards the mean."""
    mean = memberships.mean(0)
    sizes = prompts.bincount(minlength=count).to(memberships)[:, None]
    sums = prompt_means(memberships, prompts, count) * sizes
    shares = ((sums + _PRIOR_IMAGES * mean) / (sizes + _PRIOR_IMAGES)).clamp(min=_LEAST_SHARE)
    return shares / shares.sum(1, keepdim=True)


def fit_values(space: Space, start: Tensor, rounds: int = ROUNDS) -> Fit:
    """Expectation maximisation from memberships ``[N, K]``.

    Stops after ``rounds``, or where no membership moves by 1e-4.
    """
    values, prompts = space.values, space.prompts
    count = int(prompts.max()) + 1
    weights = prompts.bincount() / len(prompts)
    covariance = values.T @ values / len(values)
    members = start.double()
    for _ in range(rounds):
        own = prompt_means(members, prompts)
        between = members.mean(0).diag() - (own.T * weights) @ own
        inner = (members - own[prompts]).T @ values / len(values)
        delta = torch.linalg.pinv(between, rtol=1e-8, hermitian=True) @ inner
        delta = delta - members.mean(0) @ delta
        noise = covariance - inner.T @ delta
        variances, axes = torch.linalg.eigh((noise + noise.T) / 2)
        precision = (axes / variances.clamp(min=_LEAST_VARIANCE)) @ axes.T
        shares, places = _shares(members, prompts, count), -own @ delta
        updated, likelihood = _expectation(values, prompts, places, shares, delta, precision)
        moved = (updated - members).abs().max()
        members = updated
        if moved < 1e-4:
            break
    return Fit(members, shares, places, delta, precision, likelihood)


def fit_shares(
    fit: Fit, values: Tensor, prompts: Tensor, equal: bool = False, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of the fit's values in images that they were not (all) found on.

    Args:
        fit: of the same number of values.
        values: float64 ``[N, D]``, centred by prompt.
        prompts: int64 ``[N]``, without gaps.
        equal: expect the values in the same shares in all prompts; the prompts' places stay free.
        rounds: at most; it stops where no share moves by 1e-4.

    Returns:
        memberships ``[N, K]``, shares ``[P, K]`` and log-likelihoods ``[N]``.
    """
    count = int(prompts.max()) + 1
    shares = fit.memberships.mean(0).clamp(min=_LEAST_SHARE).expand(count, -1)
    if len(fit.shares) == count:
        shares = fit.shares
    places, own = -shares @ fit.delta, shares
    if equal:
        shares = shares.mean(0).expand(count, -1)
    for _ in range(rounds):
        members, likelihood = _expectation(
            values, prompts, places, shares, fit.delta, fit.precision
        )
        updated = _shares(members, prompts, count)
        places = -prompt_means(members, prompts) @ fit.delta
        shares = members.mean(0).clamp(min=_LEAST_SHARE).expand(count, -1) if equal else updated
        moved = (updated - own).abs().max()
        own = updated
        if moved < 1e-4:
            break
    return members, own, likelihood


def log_likelihood_ratio(fit: Fit, space: Space) -> float:
    """Twice the log-likelihood of own over equal shares of the fit's values, at least 0."""
    own = fit_shares(fit, space.values, space.prompts)[2]
    equal = fit_shares(fit, space.values, space.prompts, equal=True)[2]
    return max(2 * float((own - equal).sum()), 0.0)


def memberships_of(fit: Fit, values: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Memberships ``[N, K]`` and shares ``[P, K]`` of all images, centred by prompt."""
    present, numbers = prompts.unique(return_inverse=True)
    members, own, _ = fit_shares(fit, values, numbers)
    shares = own.new_full((int(prompts.max()) + 1, own.shape[1]), float("nan"))
    shares[present] = own
    return members, shares


def kmeans_memberships(
    values: Tensor, groups: int, source: torch.Generator, rounds: int = 30
) -> Tensor:
    """One-hot groups of k-means, float64 ``[N, K]``, started by k-means++."""
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
