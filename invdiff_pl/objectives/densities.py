"""Where in the noise training draws its timesteps, and how much each loss counts there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import sample_timesteps, stratified_uniform
from invdiff_pl.backbones.noising import NoiseProcess
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.names import DENSITIES, require_name

# The part of separation-weighted draws that stays uniform, so that no timestep goes untrained.
UNIFORM_SHARE = 0.2


@dataclass(frozen=True)
class Density:
    """A distribution of timesteps.

    Attributes:
        probabilities: float64 ``[T]`` with sum 1.
        exponent: where the density is that of ``T u ** exponent``, so that its quantiles need no
            table.
    """

    probabilities: Tensor
    exponent: float | None = None

    def sample(self, count: int, source: torch.Generator) -> Tensor:
        """Draw ``count`` timesteps, one in each of ``count`` equal strata, in random order.

        Returns:
            int64 ``[count]`` in ``[0, T)``.
        """
        total = len(self.probabilities)
        if self.exponent is not None:
            return sample_timesteps(count, total, self.exponent, source)
        uniform = stratified_uniform(count, source).double()
        timesteps = torch.searchsorted(self.probabilities.cumsum(0), uniform, right=True)
        return timesteps.clamp(max=total - 1)

    def mass(self, first: int, end: int) -> float:
        """Probability of the timesteps from ``first`` up to ``end``, exclusive."""
        return float(self.probabilities[first:end].sum())


def build_density(
    name: str,
    train_timesteps: int,
    exponent: float = 1 / 3,
    timesteps: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Density:
    """The density of a name.

    Args:
        name: ``uniform``; ``high_noise``, that of ``T u ** exponent``, which leans towards high
            noise, where layout and background are decided; or ``separation``, which follows how
            well each timestep tells the environments apart, as the inference stage weighs them.
        train_timesteps: T.
        exponent: of ``high_noise``, above 0; 1 is uniform.
        timesteps: the inference stage's, ascending; each stands for those since the one before.
        weights: of these timesteps, at least 0, with a positive sum.

    Raises:
        InvDiffError: if there is no such density, or ``separation`` lacks its weights.
    """
    require_density(name, exponent)
    if name == "separation":
        if not timesteps or not weights or len(timesteps) != len(weights):
            raise InvDiffError(
                "timestep_density=separation needs `timesteps` and as many "
                "`timestep_weights` in environments.json: rerun the environments stage, or choose "
                "high_noise.",
                "timestep_density",
            )
        return _separation(train_timesteps, timesteps, weights)
    exponent = 1.0 if name == "uniform" else exponent
    edges = (torch.arange(train_timesteps + 1, dtype=torch.float64) / train_timesteps) ** (
        1 / exponent
    )
    return Density(edges.diff(), exponent)


def require_density(name: str, exponent: float) -> None:
    """Refuse a name or an exponent of :func:`build_density`.

    Raises:
        InvDiffError: naming the setting.
    """
    require_name("timestep_density", name, DENSITIES)
    if exponent <= 0:
        raise InvDiffError(
            f"high_noise_exponent={exponent}: expected more than 0.", "high_noise_exponent"
        )


def _separation(
    train_timesteps: int, timesteps: Sequence[int], weights: Sequence[float]
) -> Density:
    ends = torch.tensor(timesteps) + 1
    share = torch.tensor(weights, dtype=torch.float64)
    if (ends.diff() <= 0).any() or ends[0] < 1 or ends[-1] > train_timesteps:
        raise InvDiffError(
            f"environments.json: timesteps {list(timesteps)} are not ascending numbers below "
            f"{train_timesteps}: rerun the environments stage."
        )
    if (share < 0).any() or not 0 < share.sum() < torch.inf:
        raise InvDiffError(
            f"environments.json: timestep_weights {list(weights)} are not shares: rerun the "
            "environments stage."
        )
    # The first stratum is as wide as the second: the grid is even.
    width = int(ends[1] - ends[0]) if len(ends) > 1 else int(ends[0])
    starts = torch.cat([(ends[:1] - width).clamp(min=0), ends[:-1]])
    probabilities = torch.full((train_timesteps,), UNIFORM_SHARE / train_timesteps).double()
    for start, end, part in zip(starts, ends, share / share.sum(), strict=True):
        probabilities[start:end] += (1 - UNIFORM_SHARE) * part / (end - start)
    return Density(probabilities)


def min_snr_weights(process: NoiseProcess, timesteps: Tensor, gamma: float) -> Tensor:
    """Loss weights of min-SNR weighting (Hang et al., arXiv 2303.09556).

    They limit the weight ``SNR`` that a loss on ``x0`` would have to ``gamma``: ``min(SNR, gamma)``
    over ``SNR`` for epsilon-, over ``SNR + 1`` for v-prediction and over ``(1 + sqrt(SNR))^2`` for
    flow matching. At a zero-SNR end the latter two are 0.

    Args:
        process: tells the signal-to-noise ratio and the prediction type.
        timesteps: int64 ``[B]``.
        gamma: 5 in the paper.

    Returns:
        float32 ``[B]``, at least 0.
    """
    ratio = process.signal_to_noise(timesteps)
    limited = ratio.clamp(max=gamma)
    if process.prediction_type == "sample":
        return limited
    if process.prediction_type == "v_prediction":
        return limited / (ratio + 1)
    if process.prediction_type == "flow":  # an error of x is sigma times one of the velocity
        return limited / (1 + ratio.sqrt()).square()
    # min(SNR, gamma) / SNR, which is 1 where there is no signal.
    return gamma / ratio.clamp(min=gamma)
