"""What measures of two sets of features share: they keep every feature, on every rank's share."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from invdiff_pl.errors import InvDiffError


class FeatureSets(Metric):
    """Features of real and of generated images, float32 ``[N, D]``; ranks gather them.

    Real images survive ``reset``, as those of a Fréchet distance do.

    Args:
        num_features: D.
        kwargs: further arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_features = num_features
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

    def sets(self, least: int, what: str) -> tuple[Tensor, Tensor]:
        """All real and all generated features.

        Raises:
            InvDiffError: if a set has fewer than ``least`` images, which ``what`` needs.
        """
        for name, chunks in (("real", self.real), ("generated", self.generated)):
            found = sum(len(chunk) for chunk in chunks)
            if found < least:
                raise InvDiffError(f"{what} at least {least} {name} images, found {found}.")
        return dim_zero_cat(self.real), dim_zero_cat(self.generated)

    def reset(self) -> None:
        """Forget the generated images."""
        real = list(self.real)  # a copy: the list itself is emptied
        super().reset()
        self.real = real

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics gathers a one-dimensional tensor from a rank that has seen no image, which
        # does not fit the other ranks' matrices.
        for name in ("real", "generated"):
            if not getattr(self, name):
                setattr(self, name, [torch.empty((0, self.num_features), device=self.device)])
        super()._sync_dist(*args, **kwargs)
