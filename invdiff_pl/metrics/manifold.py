"""Precision, recall, density and coverage of generated images, by their nearest neighbours."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from invdiff_pl.metrics.feature_sets import FeatureSets
from invdiff_pl.utils.errors import InvDiffError

_ENTRIES = 1 << 21  # of a distance matrix, held at one time
_COLUMNS = 1024


class ManifoldScores(FeatureSets):
    """How well generated images fill the manifold of the real ones, and stay within it.

    Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991), density
    and coverage (Naeem et al., ICML 2020, arXiv 2002.09797). The manifold of a set is the union of
    the balls around its features that reach to their k-th nearest neighbours within the set.

    Features are kept, at 4 D bytes per image, and distances are computed some at a time, so memory
    grows with N and not with its square.

    Args:
        num_features: D, the length of a feature vector.
        neighbours: k, the number of neighbours.
        kwargs: further arguments of ``torchmetrics.Metric``.

    Raises:
        InvDiffError: if ``neighbours`` is below 1.
    """

    higher_is_better = True

    def __init__(self, num_features: int, neighbours: int = 3, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        if neighbours < 1:
            raise InvDiffError(f"neighbours must be at least 1, found {neighbours}.")
        self.neighbours = neighbours

    def compute(self) -> dict[str, Tensor]:
        """Compute ``precision``, ``recall``, ``coverage``, in [0, 1], and ``density``, at least 0.

        Raises:
            InvDiffError: if a set has k images or fewer.
        """
        need = f"precision and recall with {self.neighbours} neighbours need"
        return manifold_scores(*self.sets(self.neighbours + 1, need), self.neighbours)


def manifold_scores(real: Tensor, generated: Tensor, neighbours: int) -> dict[str, Tensor]:
    """Compute precision, recall, density and coverage of two sets of features.

    Args:
        real: ``[N, D]``, N above ``neighbours``.
        generated: ``[M, D]``, M above ``neighbours``.
        neighbours: k, the number of neighbours.

    Returns:
        float64 scalars by name.
    """
    real_radii = squared_radii(real, neighbours)
    generated_radii = squared_radii(generated, neighbours)
    # Number of real balls that hold each generated image.
    within_real = torch.zeros(len(generated), dtype=torch.float64, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = covered.clone()
    for rows, distances in squared_distances(real, generated):
        inside = distances <= real_radii[rows, None]
        within_real += inside.sum(0)
        covered[rows] = inside.any(1)
        recalled[rows] = (distances <= generated_radii).any(1)
    return {
        "precision": (within_real > 0).double().mean(),
        "recall": recalled.double().mean(),
        "density": within_real.mean() / neighbours,
        "coverage": covered.double().mean(),
    }


def squared_radii(features: Tensor, neighbours: int) -> Tensor:
    """Return the squared distance of each feature to its k-th nearest other feature, ``[N]``."""
    radii = torch.empty(len(features), dtype=torch.float64, device=features.device)
    for rows, distances in squared_distances(features, features):
        # The nearest is the feature itself, at distance 0.
        radii[rows] = distances.topk(neighbours + 1, dim=1, largest=False).values[:, -1]
    return radii


def squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of the float64 matrix of squared distances ``[len(a), len(b)]``, some at a time.

    They are valid until the next rows are requested: all of them use the same memory.
    """
    count = max(1, _ENTRIES // len(b))
    memory = torch.empty((min(count, len(a)), len(b)), dtype=torch.float64, device=a.device)
    for start in range(0, len(a), count):
        rows = slice(start, min(start + count, len(a)))
        chunk = a[rows].double()
        norms = chunk.square().sum(1, keepdim=True)
        distances = memory[: len(chunk)]
        # Some of b at a time is copied to float64: all of it would outweigh the features.
        for first in range(0, len(b), _COLUMNS):
            part = b[first : first + _COLUMNS].double()
            columns = distances[:, first : first + _COLUMNS]
            torch.add(norms, part.square().sum(1), out=columns)
            columns.addmm_(chunk, part.mT, alpha=-2)
        yield rows, distances.clamp_(min=0)
