"""Precision, recall, density and coverage of generated images, by their nearest neighbours."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from invdiff_pl.errors import InvDiffError

_ENTRIES = 1 << 24  # of a distance matrix, held at a time


class ManifoldScores(Metric):
    """How well generated images fill the real ones' manifold, and stay in it.

    Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, arXiv 1904.06991), density
    and coverage (Naeem et al., ICML 2020, arXiv 2002.09797). A set's manifold is the union of the
    balls around its features that reach to their k-th nearest neighbour within the set.

    Features of both sets are kept, float32 ``[N, D]`` (ranks gather them), and distances are taken
    in chunks, so memory grows with N and not with its square.

    Args:
        num_features: D.
        neighbours: k.
        kwargs: further arguments of ``torchmetrics.Metric``.

    Raises:
        InvDiffError: if ``neighbours`` is below 1.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, num_features: int, neighbours: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if neighbours < 1:
            raise InvDiffError(f"neighbours must be at least 1, found {neighbours}.")
        self.num_features = num_features
        self.neighbours = neighbours
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        """Add features ``[N, D]`` of real or of generated images.

        Raises:
            InvDiffError: if they have another shape.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise InvDiffError(
                f"features must have shape [N, {self.num_features}], found {list(features.shape)}."
            )
        (self.real if real else self.generated).append(features.to(self.device, torch.float32))

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall`` and ``coverage`` in [0, 1], ``density`` at least 0.

        Raises:
            InvDiffError: if a set has no more than k images.
        """
        sets = {"real": self.real, "generated": self.generated}
        for name, chunks in sets.items():
            found = sum(len(chunk) for chunk in chunks)
            if found <= self.neighbours:
                raise InvDiffError(
                    f"precision and recall with {self.neighbours} neighbours need more than "
                    f"{self.neighbours} {name} images, found {found}."
                )
        return manifold_scores(
            dim_zero_cat(self.real), dim_zero_cat(self.generated), self.neighbours
        )

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics gathers a one-dimensional tensor from a rank that has seen no image, which
        # does not fit the other ranks' matrices.
        for name in ("real", "generated"):
            if not getattr(self, name):
                setattr(self, name, [torch.empty((0, self.num_features), device=self.device)])
        super()._sync_dist(*args, **kwargs)


def manifold_scores(real: Tensor, generated: Tensor, neighbours: int) -> dict[str, Tensor]:
    """Precision, recall, density and coverage of two sets of features.

    Args:
        real: ``[N, D]``, N above ``neighbours``.
        generated: ``[M, D]``, M above ``neighbours``.
        neighbours: k.

    Returns:
        float64 scalars by name.
    """
    real, generated = real.double(), generated.double()
    real_radii = squared_radii(real, neighbours)
    generated_radii = squared_radii(generated, neighbours)
    within_real = real.new_zeros(len(generated))  # how many real balls hold a generated image
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = covered.clone()
    for rows, distances in _squared_distances(real, generated):
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
    """Squared distance of each feature to its k-th nearest other one, ``[N]``."""
    radii = features.new_empty(len(features))
    for rows, distances in _squared_distances(features, features):
        # The nearest is the feature itself, at distance 0.
        radii[rows] = distances.topk(neighbours + 1, dim=1, largest=False).values[:, -1]
    return radii


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the matrix of squared distances ``[len(a), len(b)]``, some at a time."""
    norms = b.square().sum(1)
    count = max(1, _ENTRIES // len(b))
    for start in range(0, len(a), count):
        chunk = a[start : start + count]
        products = chunk @ b.mT
        yield (
            slice(start, start + len(chunk)),
            (chunk.square().sum(1, keepdim=True) + norms - 2 * products).clamp(min=0),
        )
