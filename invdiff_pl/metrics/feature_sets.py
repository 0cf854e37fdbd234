"""Base of measures of two sets of features, which keep every feature of a rank's share."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from invdiff_pl.utils.errors import InvDiffError

_FIRST_ROWS = 1024


class FeatureSets(Metric):
    """Features of real and of generated images, float32 ``[N, D]``, gathered over ranks.

    Real images are kept on ``reset``, as those of a Fréchet distance are. Each set is one tensor
    with room to spare: thousands of small ones, each allocated between two passes of a network,
    would keep the allocator from reusing what the network frees around them.

    Args:
        num_features: D, the length of a feature vector.
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
            InvDiffError: if the features have another shape.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise InvDiffError(
                f"features must have shape [N, {self.num_features}], found {list(features.shape)}."
            )
        chunks = self.real if real else self.generated
        chunks[:] = [_extended(self._joined(chunks), features)]

    def sets(self, least: int, what: str) -> tuple[Tensor, Tensor]:
        """Return all real and all generated features.

        Raises:
            InvDiffError: if a set has fewer than ``least`` images, which ``what`` needs.
        """
        found = {}
        for name in ("real", "generated"):
            found[name] = self._joined(getattr(self, name))
            if len(found[name]) < least:
                raise InvDiffError(
                    f"{what} at least {least} {name} images, found {len(found[name])}."
                )
        return found["real"], found["generated"]

    def _joined(self, state: list[Tensor] | Tensor) -> Tensor:
        # Ranks gather a tensor. torch.cat would copy even a single one.
        if isinstance(state, Tensor):
            return state
        if len(state) == 1:
            return state[0]
        empty = torch.empty((0, self.num_features), dtype=torch.float32, device=self.device)
        return torch.cat([empty, *state])

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


def _extended(rows: Tensor, more: Tensor) -> Tensor:
    """Append rows, giving float32 ``[N + M, D]``, in place if there is room."""
    count, dim = len(rows) + len(more), rows.shape[1]
    if rows.untyped_storage().nbytes() < count * dim * rows.element_size():
        room = rows.new_empty((max(_FIRST_ROWS, 2 * len(rows), count), dim))
        room[: len(rows)] = rows
        rows = room
    extended = rows.as_strided((count, dim), (dim, 1), 0)
    extended[count - len(more) :] = more
    return extended
