"""Maximum mean discrepancy between two sets of features, such as CMMD on CLIP embeddings."""

from typing import Any

import torch
from torch import Tensor

from invdiff_pl.metrics.feature_sets import FeatureSets
from invdiff_pl.metrics.manifold import squared_distances
from invdiff_pl.utils.errors import InvDiffError


class MaximumMeanDiscrepancy(FeatureSets):
    """Squared MMD with a Gaussian kernel; on CLIP embeddings of unit length it is CMMD.

    Jayasumana et al., "Rethinking FID", CVPR 2024, arXiv 2401.09603: bandwidth 10, times 1000,
    means over all pairs, including those of an image with itself, as in the authors' code.

    Args:
        num_features: D.
        bandwidth: sigma of the kernel ``exp(-|x - y|^2 / (2 sigma^2))``.
        factor: factor that the result is multiplied by.
        kwargs: further arguments of ``torchmetrics.Metric``.

    Raises:
        InvDiffError: if the bandwidth is not positive.
    """

    higher_is_better = False

    def __init__(
        self, num_features: int, bandwidth: float = 10.0, factor: float = 1000.0, **kwargs: Any
    ) -> None:
        super().__init__(num_features, **kwargs)
        if bandwidth <= 0:
            raise InvDiffError(f"the kernel's bandwidth must be positive, found {bandwidth}.")
        self.bandwidth = bandwidth
        self.factor = factor

    def compute(self) -> Tensor:
        """Compute the discrepancy, a float64 scalar.

        Raises:
            InvDiffError: if a set is empty.
        """
        real, generated = self.sets(1, "the maximum mean discrepancy needs")
        return self.factor * squared_discrepancy(real, generated, self.bandwidth)


def squared_discrepancy(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """Compute ``mean k(a, a') + mean k(b, b') - 2 mean k(a, b)``, over all pairs.

    Args:
        a: ``[N, D]``; computed in float64, some rows at a time.
        b: ``[M, D]``.
        bandwidth: sigma of the Gaussian kernel.

    Returns:
        float64 scalar.
    """
    within = _mean_kernel(a, a, bandwidth) + _mean_kernel(b, b, bandwidth)
    return within - 2 * _mean_kernel(a, b, bandwidth)


def _mean_kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for _, distances in squared_distances(a, b):
        total += distances.div_(-2 * bandwidth**2).exp_().sum()
    return total / (len(a) * len(b))
