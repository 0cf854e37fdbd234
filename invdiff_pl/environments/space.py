"""The space in which hidden attributes are looked for: leading components within prompts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.tensors import first_not_finite

# Images per chunk when all images are projected onto components.
CHUNK = 16384
# Up to so many features all components are computed, beyond them only the leading ones.
_FEW_FEATURES = 1024
_SUBSPACE_ROUNDS = 12
_SUBSPACE_MARGIN = 30


def prompt_means(values: Tensor, prompts: Tensor, count: int | None = None) -> Tensor:
    """Return the mean of each prompt's rows, ``[P, ...]``; 0 for a prompt without any."""
    count = int(prompts.max()) + 1 if count is None else count
    sizes = prompts.bincount(minlength=count).clamp(min=1).to(values)
    rows = values.reshape(len(values), -1)
    sums = values.new_zeros(count, rows.shape[1]).index_add_(0, prompts, rows)
    return (sums / sizes[:, None]).reshape(count, *values.shape[1:])


def require_finite(features: Tensor) -> None:
    """Check that features are finite.

    Raises:
        InvDiffError: naming the first image whose features are not.
    """
    if (bad := first_not_finite(features)) is not None:
        raise InvDiffError(f"features of image {bad} (counted from 0) are not finite.")


@dataclass(frozen=True)
class Space:
    """Images on the leading principal components of what varies within prompts.

    Attributes:
        values: float64 ``[N, D]``, of mean 0 in each prompt and covariance I within prompts.
        prompts: int64 ``[N]``, without gaps.
        offsets: offsets of the prompts' means from the overall mean, float64 ``[P, D]``.
        axes: axes of the components, float64 ``[F, D]``: ``(features - prompt's mean) @ axes``.
        deviations: standard deviations of the components in features of variance 1, by which
            whitening divides, float64 ``[D]``, descending.
    """

    values: Tensor
    prompts: Tensor
    offsets: Tensor
    axes: Tensor
    deviations: Tensor

    @property
    def uncentred(self) -> Tensor:
        """Values with the differences between prompts, ``[N, D]``."""
        return self.values + self.offsets[self.prompts]

    def rows(self, chosen: Tensor) -> "Space":
        """Return the space of some of the images, centred anew."""
        prompts, numbers = self.prompts[chosen].unique(return_inverse=True)
        values = self.values[chosen]
        values = values - prompt_means(values, numbers)[numbers]
        return replace(self, values=values, prompts=numbers, offsets=self.offsets[prompts])

    def leading(self, components: int) -> "Space":
        """Return the space of the first components."""
        few = slice(components)
        values, offsets = self.values[:, few].contiguous(), self.offsets[:, few]
        return Space(values, self.prompts, offsets, self.axes[:, few], self.deviations[few])

    def dealt(self, source: torch.Generator, places: Tensor) -> "Space":
        """Deal residuals anew over prompts, as if prompts differed in their places only.

        Args:
            source: source of the random order.
            places: fitted places of the prompts, float64 ``[P, D]``.
        """
        sizes = self.prompts.bincount().clamp(min=2).double()
        # Residuals of a small prompt are too short, since its mean is that of its own images.
        residuals = self.values * (sizes / (sizes - 1)).sqrt()[self.prompts][:, None]
        residuals = residuals - places[self.prompts]
        residuals = residuals[torch.randperm(len(residuals), generator=source)]
        return self.of_values(residuals)[0]

    def of_values(self, values: Tensor) -> tuple["Space", Tensor]:
        """Centre and whiten other values of the same images; also return the map ``[D, D]``."""
        values = values - prompt_means(values, self.prompts)[self.prompts]
        free = max(len(values) - int(self.prompts.max()) - 1, 1)
        variances, axes = torch.linalg.eigh(values.T @ values / free)
        # Whitened without a rotation, so that leading components stay the leading ones.
        whitening = (axes / variances.clamp(min=1e-9).sqrt()) @ axes.T
        offsets, axes = self.offsets @ whitening, self.axes @ whitening
        return replace(self, values=values @ whitening, offsets=offsets, axes=axes), whitening

    def of(self, features: Tensor, prompts: Tensor) -> Tensor:
        """Project features ``[N, F]`` of all images to components ``[N, D]``, centred by prompt."""
        values = torch.cat([part.double() @ self.axes for part in features.split(CHUNK)])
        return values.sub_(prompt_means(values, prompts)[prompts])


def whiten(features: Tensor, prompts: Tensor, components: int) -> Space | None:
    """Build the space of the leading components of features, scaled to variance 1 within prompts.

    Args:
        features: ``[N, F]``.
        prompts: int64 ``[N]``, without gaps.
        components: maximum of D, the number of components.

    Returns:
        the space; ``None`` if features do not vary within prompts.
    """
    centred = features.double()
    means = prompt_means(centred, prompts)
    middle = centred.mean(0)
    centred = centred - means[prompts]
    free = max(len(centred) - len(means), 1)
    deviations = (centred.square().sum(0) / free).sqrt()
    scale = torch.where(deviations > 1e-9, 1 / deviations.clamp(min=1e-9), 0.0)
    variances, axes = _principal(centred * scale, min(components, free), free)
    kept = int((variances > 1e-9 * variances.max().clamp(min=1e-9)).sum())
    if kept == 0 or variances.max() <= 1e-9:
        return None
    spread = variances[:kept].sqrt()
    axes = scale[:, None] * axes[:, :kept] / spread
    return Space(centred @ axes, prompts, (means - middle) @ axes, axes, spread)


def _principal(centred: Tensor, count: int, free: int) -> tuple[Tensor, Tensor]:
    """Return the largest variances ``[C]`` of the columns' covariance, and the axes ``[F, C]``."""
    if centred.shape[1] <= _FEW_FEATURES:
        variances, axes = torch.linalg.eigh(centred.T @ centred / free)
        return variances.flip(0)[:count], axes.flip(1)[:, :count]
    # Subspace iteration: all components of many features would take hours.
    width = min(count + _SUBSPACE_MARGIN, *centred.shape)
    axes = torch.randn(
        centred.shape[1], width, dtype=centred.dtype, generator=generator(0, "components")
    )
    for _ in range(_SUBSPACE_ROUNDS):
        axes = torch.linalg.qr(centred.T @ (centred @ axes)).Q
    reduced = centred @ axes
    variances, turns = torch.linalg.eigh(reduced.T @ reduced / free)
    return variances.flip(0)[:count], (axes @ turns.flip(1))[:, :count]
