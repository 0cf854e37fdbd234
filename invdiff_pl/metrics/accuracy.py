"""How often a classifier recognises in an image what its prompt asked for."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from invdiff_pl.metrics.intervals import wilson_interval
from invdiff_pl.utils.errors import InvDiffError


class PromptAccuracy(Metric):
    """Share of images whose prompt a classifier recognises.

    The state is a table of counts, summed over ranks.

    Args:
        num_prompts: number of prompts P, at least 1.
        confidence: confidence level of the interval, in (0, 1).
        kwargs: further arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, num_prompts: int, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.confidence = confidence
        counts = torch.zeros((num_prompts, 2), dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, prompts: Tensor, told: Tensor) -> None:
        """Count N images.

        Args:
            prompts: integer ``[N]``, prompts that the images were drawn for, in [0, P).
            told: integer ``[N]``, prompts that the classifier recognised.
        """
        cells = prompts * 2 + (told == prompts)
        self.counts += cells.bincount(minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """Compute the figures over all images of all ranks.

        Returns:
            ``mean``, ``interval [2]`` (Wilson) and ``counts [P, 2]`` of wrong and right images.

        Raises:
            InvDiffError: if there were no images.
        """
        right, seen = self.counts[:, 1].sum(), self.counts.sum()
        if int(seen) == 0:
            raise InvDiffError("prompt accuracy needs at least one image, found none.")
        return {
            "mean": right.double() / seen,
            "interval": wilson_interval(right, seen, self.confidence),
            "counts": self.counts.clone(),
        }
