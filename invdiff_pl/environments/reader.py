"""Reading the environments of images other than those that environments were inferred from.

The inferred environments label the training images. A linear reader of the frozen denoiser's
features learns these labels, prompt by prompt in a space that all prompts share, so that samples
can be counted by environment without any human labels.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator

# Relative to the mean variance of features within (prompt, environment).
RIDGE = 0.1
# Numbers of dimensions of the shared space that are tried.
RANKS = (1, 2, 4, 8)
FOLDS = 2


@dataclass(frozen=True)
class EnvironmentReader:
    """Reads the environment of the nearest centroid, in the space that tells environments apart.

    Attributes:
        projection: projection into that space, where the variance within environments is 1,
            float64 ``[D, r]``.
        centroids: centroids of each prompt's environments, float64 ``[P, G, r]``; NaN where a
            prompt lacks an environment.
        confusion: how often images of each environment (row) were read as each (column), on images
            not learned from, float64 ``[G, G]``; rows sum to 1.
    """

    projection: Tensor
    centroids: Tensor
    confusion: Tensor

    @property
    def recall(self) -> float:
        """Recall of the environment that is read worst, in [0, 1]."""
        return float(self.confusion.diagonal().min())

    def read(self, features: Tensor, prompts: Tensor) -> Tensor:
        """Read the environment of each image.

        Args:
            features: ``[N, D]``.
            prompts: int64 ``[N]``.

        Returns:
            int64 ``[N]``.
        """
        return _nearest(features.double() @ self.projection, prompts, self.centroids)

    def corrected(self, read: Tensor) -> Tensor:
        """Correct what was read for the reader's errors, without bias.

        Args:
            read: environments as read, int64 ``[...]``.

        Returns:
            float64 ``[..., G]``: rows of the inverse confusion (Rogan and Gladen 1978, for more
            than two classes), whose means over images are shares of environments; they sum to 1.
        """
        return torch.linalg.pinv(self.confusion)[read]


def fit_reader(
    features: Tensor, prompts: Tensor, assignments: Tensor, groups: int, seed: int = 0
) -> EnvironmentReader:
    """Learn the environments of images from their features.

    The method is Fisher's discriminant within prompts: of the directions in which a prompt's
    environments lie apart, relative to the variance within them, those that count most over all
    prompts. An environment need not mean the same in every prompt: each prompt has its own
    centroids. By cross-validation, images are read by a reader that has learned from the others,
    which gives the confusion and chooses the number of directions.

    Args:
        features: ``[N, D]``.
        prompts: int64 ``[N]``.
        assignments: environment of each image, int64 ``[N]`` in ``[0, G)``.
        groups: G, the number of environments.
        seed: seed of the folds.

    Raises:
        ValueError: if there are fewer than two images per fold and environment.
    """
    if len(features) < 2 * FOLDS * groups:
        raise ValueError(f"{len(features)} images are too few to learn {groups} environments")
    features = features.double()
    shape = int(prompts.max()) + 1, groups
    folds = torch.randperm(len(features), generator=generator(seed, "reader folds")) % FOLDS
    parts = [(folds != fold, folds == fold) for fold in range(FOLDS)]
    fitted = [
        _directions(features[learned], prompts[learned], assignments[learned], shape)
        for learned, _ in parts
    ]
    confusions = {}
    for rank in (rank for rank in RANKS if rank <= min(found.shape[1] for found in fitted)):
        counts = torch.zeros((groups, groups), dtype=torch.float64)
        for (learned, told), directions in zip(parts, fitted, strict=True):
            places = features @ directions[:, :rank]
            centroids, _ = _cell_means(
                places[learned], prompts[learned], assignments[learned], shape
            )
            cells = assignments[told] * groups + _nearest(places[told], prompts[told], centroids)
            counts += cells.bincount(minlength=groups**2).view(groups, groups)
        confusions[rank] = counts / counts.sum(1, keepdim=True).clamp(min=1)
    best = max(confusions, key=lambda rank: float(confusions[rank].diagonal().mean()))
    projection = _directions(features, prompts, assignments, shape)[:, :best]
    centroids, _ = _cell_means(features @ projection, prompts, assignments, shape)
    return EnvironmentReader(projection, centroids, confusions[best])


def _nearest(places: Tensor, prompts: Tensor, centroids: Tensor) -> Tensor:
    """Return the environment of each image's prompt with the nearest centroid, int64 ``[N]``."""
    distances = (places[:, None] - centroids[prompts]).square().sum(2)
    return distances.nan_to_num(nan=torch.inf).argmin(1)


def _cell_means(
    values: Tensor, prompts: Tensor, assignments: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return means ``[P, G, C]`` of each (prompt, environment), and image counts ``[P, G]``.

    Means of no images are NaN.
    """
    cells = prompts * shape[1] + assignments
    counts = cells.bincount(minlength=shape[0] * shape[1])
    sums = values.new_zeros((len(counts), values.shape[1])).index_add_(0, cells, values)
    return (sums / counts[:, None]).view(*shape, -1), counts.view(shape)


def _directions(
    values: Tensor, prompts: Tensor, assignments: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Return directions ``[D, r]`` of unit variance within environments, most important first."""
    means, counts = _cell_means(values, prompts, assignments, shape)
    residuals = values - means[prompts, assignments]
    covariance = residuals.T @ residuals / len(values)
    smallest = torch.finfo(torch.float64).tiny
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=smallest)
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance)).double())
    weights = counts.double()[..., None]
    centres = (means.nan_to_num() * weights).sum(1) / weights.sum(1).clamp(min=1)
    apart = (means - centres[:, None]).nan_to_num() * weights.sqrt()
    white = torch.linalg.solve_triangular(factor, apart.flatten(0, 1).T, upper=False)
    most = min(max(RANKS), (shape[1] - 1) * shape[0], len(white))
    axes = torch.linalg.svd(white, full_matrices=False).U[:, :most]
    return torch.linalg.solve_triangular(factor.T, axes, upper=True)


@dataclass(frozen=True)
class Counts:
    """Environments of samples at one scale, in pairs of opposite noise.

    Attributes:
        pairs: float64 ``[P, M, G]``, the mean of :meth:`EnvironmentReader.corrected` over the two
            samples of each of M pairs of each prompt.
    """

    pairs: Tensor

    @property
    def shares(self) -> Tensor:
        """Shares of each prompt's environments, float64 ``[P, G]``."""
        return self.pairs.mean(1)

    def noise(self, other: "Counts") -> float:
        """Estimate the covariance of two scales' errors, summed over prompts and environments.

        Both scales' pairs start from the same noises, so it follows from the covariance of pairs.
        """
        first, second = self.pairs - self.shares[:, None], other.pairs - other.shares[:, None]
        pairs = self.pairs.shape[1]
        return float((first * second).sum() / (pairs - 1) / pairs)


def even_scale(counts: dict[float, Counts]) -> float | None:
    """Find the scale at which every prompt's environments are drawn most evenly.

    Shares are taken as linear between neighbouring scales; the squared distance to even shares,
    summed over prompts, is least where its derivative is 0. What counting few samples adds to the
    distance and to its derivative is subtracted; otherwise noise would pull the scale to the
    middle.

    Args:
        counts: counts by scale, two or more.

    Returns:
        the scale; ``None`` if shares do not change from scale to scale by more than noise.
    """
    scales = sorted(counts)
    best: tuple[float, float] | None = None
    for low, high in pairwise(scales):
        first, second = counts[low], counts[high]
        apart, step = first.shares - 1 / first.shares.shape[1], second.shares - first.shares
        at_low, at_high, both = first.noise(first), second.noise(second), first.noise(second)
        counted = at_low + at_high - 2 * both
        length = float(step.square().sum()) - counted
        if length <= counted:  # half of the change or more is noise
            continue
        slope = float((apart * step).sum()) - (both - at_low)
        part = min(1.0, max(0.0, -slope / length))
        noise = (1 - part) ** 2 * at_low + 2 * part * (1 - part) * both + part**2 * at_high
        distance = float((apart + part * step).square().sum()) - noise
        if best is None or distance < best[0]:
            best = distance, low + part * (high - low)
    return None if best is None else best[1]
