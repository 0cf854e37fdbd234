"""Telling the environment of images that were not there when environments were inferred.

The inferred environments label the training images. A linear reader of the frozen denoiser's
features learns them, prompt by prompt in a space that all prompts share, so that samples can be
counted by environment without anybody's labels.
"""

from dataclasses import dataclass

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

    def shares(self, counts: Tensor) -> Tensor:
        """Shares of the environments, with the reader's errors taken out.

        Args:
            counts: images read as each environment, ``[P, G]``.

        Returns:
            float64 ``[P, G]``, rows summing to 1: the solution of ``shares @ confusion = read``
            (Rogan and Gladen 1978, for more than two classes), cut off at 0.
        """
        read = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
        shares = torch.linalg.lstsq(self.confusion.T, read.T).solution.T.clamp(min=0)
        return shares / shares.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


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
    """
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


def even_scale(scales: Tensor, shares: Tensor) -> float:
    """The scale at which every prompt's environments are drawn most evenly.

    Args:
        scales: float64 ``[S]``, rising.
        shares: float64 ``[S, P, G]``, the environments' shares in samples at each scale.

    Returns:
        where the mean squared distance of the shares to ``1 / G`` is least, shares being
        interpolated linearly between scales.
    """
    apart = shares.double().flatten(1) - 1 / shares.shape[2]
    best, least = float(scales[0]), float(apart[0].square().mean())
    for left in range(len(scales) - 1):
        step = apart[left + 1] - apart[left]
        length = float(step.square().sum())
        part = min(1.0, max(0.0, -float(apart[left] @ step) / length)) if length > 0 else 0.0
        distance = float((apart[left] + part * step).square().mean())
        if distance < least:
            least = distance
            best = float(scales[left] + part * (scales[left + 1] - scales[left]))
    return best
