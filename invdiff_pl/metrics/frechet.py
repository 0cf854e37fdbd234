"""Fréchet distance between the features of real and generated images."""

from typing import Any, NamedTuple

import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from invdiff_pl.metrics.extractors import FeatureExtractor
from invdiff_pl.utils.errors import InvDiffError


class FeatureStatistics(NamedTuple):
    """Mean, covariance and number of a set of feature vectors.

    ``_asdict()`` gives a dictionary of contiguous tensors, which ``safetensors.torch.save_file``
    takes.

    Attributes:
        mean: float64 ``[D]``.
        covariance: float64 ``[D, D]``, unbiased (divided by n - 1).
        samples: int64 scalar, the number n of vectors.
    """

    mean: Tensor
    covariance: Tensor
    samples: Tensor


class FrechetDistance(FrechetInceptionDistance):
    """Fréchet distance of Gaussians fitted to features (FID, with the Inception extractor).

    The sums are torchmetrics' own: float64, added over ranks, and hence exact if ranks see
    different numbers of images. Beyond torchmetrics:

    - ``compute`` returns float64 and works on a rank that has seen no image (torchmetrics rounds
      to the dtype of the last features, and fails if there were none);
    - the trace term stays accurate for rank-deficient covariances, of fewer images than features,
      see :func:`frechet_distance`;
    - the extractor is kept out of the module tree, so it enters no checkpoint; it is moved to the
      metric's device when used;
    - statistics of the real set can be read and set, so that they are computed only once.

    Real images are kept on ``reset``.

    Args:
        extractor: maps images to features; see :mod:`invdiff_pl.metrics.extractors`.
        kwargs: further arguments of ``torchmetrics.Metric``.
    """

    extractor: FeatureExtractor

    def __init__(self, extractor: FeatureExtractor, **kwargs: Any) -> None:
        features = nn.Identity()
        features.num_features = torch.tensor(extractor.num_features)
        super().__init__(feature=features, reset_real_features=False, **kwargs)
        object.__setattr__(self, "extractor", extractor)  # not a submodule
        self._cached: FeatureStatistics | None = None

    def update(self, samples: Tensor, real: bool) -> None:
        """Add a batch of images or features.

        Args:
            samples: images ``[N, 3, H, W]`` as the extractor takes them (uint8, or floating
                point in [0, 1]), or features ``[N, D]`` of images that were already encoded.
            real: whether the samples belong to the reference set.

        Raises:
            InvDiffError: if the samples do not suit the extractor, or real ones come after
                :meth:`set_real_statistics`.
        """
        if real and self._cached is not None:
            raise InvDiffError("real images cannot be added to statistics that were set.")
        samples = samples.to(self.device)
        if samples.ndim != 2:
            samples = self.extractor.to(self.device)(samples)
        if samples.shape[1] != self.extractor.num_features:
            raise InvDiffError(
                f"features must have shape [N, {self.extractor.num_features}], "
                f"found {list(samples.shape)}."
            )
        super().update(samples, real)

    def update_features(self, features: Tensor, real: bool) -> None:
        """Add features ``[N, D]`` of already encoded images; otherwise like :meth:`update`."""
        if features.ndim != 2:
            raise InvDiffError(f"features must have shape [N, D], found {list(features.shape)}.")
        self.update(features, real)

    def compute(self) -> Tensor:
        """Compute the distance between all real and all generated images, a float64 scalar.

        Raises:
            InvDiffError: if either set has fewer than 2 images.
        """
        real, generated = self._real(), self._statistics("fake", "generated")
        return frechet_distance(real.mean, real.covariance, generated.mean, generated.covariance)

    def real_statistics(self) -> FeatureStatistics:
        """Return the statistics of the real set over all ranks; every rank must call this method.

        Raises:
            InvDiffError: if there are fewer than 2 real images.
        """
        if self._cached is not None:
            return self._cached
        with self.sync_context(should_sync=self._to_sync):
            return self._real()

    def set_real_statistics(self, mean: Tensor, covariance: Tensor, samples: Tensor) -> None:
        """Set the statistics of the real set, in place of images; every rank must call this method.

        They are not part of the summed state, so the number of ranks does not multiply them.

        Args:
            mean: mean of the features, ``[D]``.
            covariance: unbiased covariance of the features, ``[D, D]``.
            samples: number of images, at least 2.

        Raises:
            InvDiffError: if the shapes do not suit the extractor or ``samples`` is below 2.
        """
        dim = self.extractor.num_features
        if mean.shape != (dim,) or covariance.shape != (dim, dim) or int(samples) < 2:
            raise InvDiffError(
                f"real statistics must have shapes [{dim}] and [{dim}, {dim}] and a count of at "
                f"least 2, found {list(mean.shape)}, {list(covariance.shape)} and {int(samples)}: "
                "they were made with another extractor, so recompute them."
            )
        self._cached = FeatureStatistics(mean.double(), covariance.double(), samples.long())
        self._computed = None

    def _real(self) -> FeatureStatistics:
        if self._cached is None:
            return self._statistics("real", "real")
        return FeatureStatistics(*(value.to(self.device) for value in self._cached))

    def _statistics(self, prefix: str, role: str) -> FeatureStatistics:
        count: Tensor = getattr(self, f"{prefix}_features_num_samples")
        if int(count) < 2:
            raise InvDiffError(
                f"the Fréchet distance needs at least 2 {role} images, found {int(count)}."
            )
        mean = getattr(self, f"{prefix}_features_sum") / count
        outer = getattr(self, f"{prefix}_features_cov_sum")
        covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
        return FeatureStatistics(mean, covariance, count.clone())


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Compute the squared Fréchet distance between two Gaussians (Dowson and Landau 1982).

    This 2-Wasserstein distance is
    ``|mean_a - mean_b|^2 + tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2)``. With ``A = F F^T`` and
    ``B = G G^T`` the last trace is the sum of the singular values of ``F^T G``. No root is taken
    of an eigenvalue that is zero up to rounding, as it would be with the eigenvalues or the matrix
    root of ``A B``, so the result is accurate for singular covariances, too.

    Args:
        mean_a: ``[D]``; computed in float64.
        cov_a: symmetric positive semidefinite ``[D, D]``.
        mean_b: ``[D]``.
        cov_b: symmetric positive semidefinite ``[D, D]``.

    Returns:
        float64 scalar, at least 0.
    """
    factor_a, factor_b = _factor(cov_a.double()), _factor(cov_b.double())
    cross = torch.linalg.svdvals(factor_a.mT @ factor_b).sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return (shift + cov_a.double().trace() + cov_b.double().trace() - 2 * cross).clamp(min=0)


def _factor(covariance: Tensor) -> Tensor:
    """Return ``F [D, rank]`` with ``F F^T`` equal to the covariance.

    This uses SciPy's MRRR driver: the divide-and-conquer driver that torch calls fails on
    covariances of few, nearly equal images, in which one eigenvalue occurs a thousand times.
    """
    found = scipy.linalg.eigh(covariance.cpu().numpy(), driver="evr")
    values, vectors = (torch.from_numpy(part).to(covariance.device) for part in found)
    floor = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    kept = values > floor
    return vectors[:, kept] * values[kept].sqrt()
