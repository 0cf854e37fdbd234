"""Telling the environment of images that were not there when environments were inferred.

The inferred environments label the training images. A linear reader of the frozen denoiser's
features learns them, prompt by prompt in a space that all prompts share, so that samples can be
counted by environment without anybody's labels.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from invdiff_pl.diffusion.draws import generator

# Against the mean variance of features within (prompt, environment).
RIDGE = 0.1
# Dimensions of the shared space that are tried.
RANKS = (1, 2, 4, 8)
FOLDS = 2


@dataclass(frozen=True)
class EnvironmentReader:
    """Nearest centroid of the prompt's environments, in the space that tells environments apart.

    Attributes:
        projection: float64 ``[D, r]``; in it the variance within environments is 1.
        centroids: float64 ``[P, G, r]``; not a number where a prompt lacks an environment.
        confusion: float64 ``[G, G]``: how often images of each environment (row) were read as each
            (column), where they had not been learned from; rows sum to 1.
    """

    projection: Tensor
    centroids: Tensor
    confusion: Tensor

    @property
    def recall(self) -> float:
        """Of the environment that is read worst, in [0, 1]."""
        return float(self.confusion.diagonal().min())

    def read(self, features: Tensor, prompts: Tensor) -> Tensor:
        """The environment of each image.

        Args:
            features: ``[N, D]``.
            prompts: int64 ``[N]``.

        Returns:
            int64 ``[N]``.
        """
        places = features.double() @ self.projection
        distances = (places[:, None] - self.centroids[prompts]).square().sum(2)
        return distances.nan_to_num(nan=torch.inf).argmin(1)

    def corrected(self, read: Tensor) -> Tensor:
        """What was read with the reader's errors taken out, without bias.

        Args:
            read: int64 ``[...]``, environments that were read.

        Returns:
            float64 ``[..., G]``: rows of the inverse confusion (Rogan and Gladen 1978, for more
            than two classes), whose means over images are shares of environments; they sum to 1.
        """
        return torch.linalg.pinv(self.confusion)[read]


def fit_reader(
    features: Tensor, prompts: Tensor, assignments: Tensor, groups: int, seed: int = 0
) -> EnvironmentReader:
    """Learn the environments of images from their features.

    Fisher's discriminant within prompts: of the directions in which a prompt's environments lie
    apart, against the variance within them, those that count most over all prompts. An environment
    need not mean the same in every prompt: centroids are each prompt's own. Images are read in
    turn by a reader that has learned from the others, which gives the confusion and chooses how
    many directions there are.

    Args:
        features: ``[N, D]``.
        prompts: int64 ``[N]``.
        assignments: int64 ``[N]``, in ``groups``.
        groups: G.
        seed: of the folds.

    Raises:
        ValueError: if there are fewer images than twice as many for each fold and environment.
    """
    if len(features) < 2 * FOLDS * groups:
        raise ValueError(f"{len(features)} images are too few to learn {groups} environments")
    features = features.double()
    folds = torch.randperm(len(features), generator=generator(seed, "reader folds")) % FOLDS
    fitted = [
        _directions(features, prompts, assignments, groups, folds != fold) for fold in range(FOLDS)
    ]
    ranks = [rank for rank in RANKS if rank <= min(found.shape[1] for found in fitted)]
    confusions = []
    for rank in ranks:
        counts = torch.zeros((groups, groups), dtype=torch.float64)
        for fold, directions in enumerate(fitted):
            learned, told = folds != fold, folds == fold
            reader = _reader(features, prompts, assignments, groups, learned, directions[:, :rank])
            read = reader.read(features[told], prompts[told])
            cells = assignments[told] * groups + read
            counts += cells.bincount(minlength=groups**2).view(groups, groups)
        confusions.append(counts / counts.sum(1, keepdim=True).clamp(min=1))
    best = max(range(len(ranks)), key=lambda n: float(confusions[n].diagonal().mean()))
    everything = torch.ones(len(features), dtype=torch.bool)
    directions = _directions(features, prompts, assignments, groups, everything)
    final = _reader(
        features, prompts, assignments, groups, everything, directions[:, : ranks[best]]
    )
    return EnvironmentReader(final.projection, final.centroids, confusions[best])


def _cell_means(
    features: Tensor, prompts: Tensor, assignments: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Means ``[P, G, C]`` of each (prompt, environment), and its number of images ``[P, G]``."""
    cells = prompts * groups + assignments
    size = (int(prompts.max()) + 1) * groups
    counts = cells.bincount(minlength=size)
    sums = features.new_zeros((size, features.shape[1])).index_add_(0, cells, features)
    means = sums / counts[:, None]
    return means.view(-1, groups, features.shape[1]), counts.view(-1, groups)


def _directions(
    features: Tensor, prompts: Tensor, assignments: Tensor, groups: int, rows: Tensor
) -> Tensor:
    """Directions ``[D, r]``, those that count most first, of unit variance within environments."""
    values, own, environments = features[rows], prompts[rows], assignments[rows]
    means, counts = _cell_means(values, own, environments, groups)
    residuals = values - means[own, environments]
    covariance = residuals.T @ residuals / len(values)
    smallest = torch.finfo(torch.float64).tiny
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=smallest)
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance)).double())
    weights = counts.double()
    centres = (means.nan_to_num() * weights[..., None]).sum(1) / weights.sum(1).clamp(min=1)[
        :, None
    ]
    apart = (means - centres[:, None]).nan_to_num() * weights.sqrt()[..., None]
    white = torch.linalg.solve_triangular(factor, apart.flatten(0, 1).T, upper=False)
    most = min(max(RANKS), (groups - 1) * len(means), len(white))
    axes = torch.linalg.svd(white, full_matrices=False).U[:, :most]
    return torch.linalg.solve_triangular(factor.T, axes, upper=True)


def _reader(
    features: Tensor,
    prompts: Tensor,
    assignments: Tensor,
    groups: int,
    rows: Tensor,
    projection: Tensor,
) -> EnvironmentReader:
    centroids = torch.full(
        (int(prompts.max()) + 1, groups, projection.shape[1]), torch.nan, dtype=torch.float64
    )
    places = features[rows] @ projection
    means, _ = _cell_means(places, prompts[rows], assignments[rows], groups)
    centroids[: len(means)] = means
    return EnvironmentReader(projection, centroids, torch.eye(groups, dtype=torch.float64))


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
        """Of each prompt's environments, float64 ``[P, G]``."""
        return self.pairs.mean(1)

    def noise(self, other: "Counts") -> float:
        """Covariance of the errors of two scales' shares, summed over prompts and environments.

        Both scales' pairs start from the same noises; the covariance of pairs tells it.
        """
        first, second = self.pairs - self.shares[:, None], other.pairs - other.shares[:, None]
        pairs = self.pairs.shape[1]
        return float((first * second).sum() / (pairs - 1) / pairs)


def even_scale(counts: dict[float, Counts]) -> float | None:
    """The scale at which every prompt's environments are drawn most evenly.

    Shares are taken as linear between neighbouring scales; the squared distance to even shares,
    summed over prompts, is least where its derivative is 0. What counting few samples adds to the
    distance and to its derivative is taken out; without that, noise draws the scale to the middle.

    Args:
        counts: by scale, two or more.

    Returns:
        ``None`` where shares do not change from scale to scale by more than noise.
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
