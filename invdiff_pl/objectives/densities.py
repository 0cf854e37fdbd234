"""Densities from which training draws its timesteps, and weights of losses by timestep."""

from dataclasses import dataclass

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import sample_timesteps
from invdiff_pl.backbones.noising import NoiseProcess
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.names import DENSITIES, require_name


@dataclass(frozen=True)
class Density:
    """The distribution of ``T u ** exponent`` for uniform ``u``.

    Attributes:
        timesteps: T, the number of timesteps.
        exponent: exponent; below 1, the density leans towards high noise.
    """

    timesteps: int
    exponent: float = 1.0

    def sample(self, count: int, source: torch.Generator) -> Tensor:
        """Draw ``count`` timesteps, one in each of ``count`` equal strata, in random order.

        Returns:
            int64 ``[count]`` in ``[0, T)``.
        """
        return sample_timesteps(count, self.timesteps, self.exponent, source)

    def mass(self, first: int, end: int) -> float:
        """Return the probability of the timesteps from ``first`` up to ``end``, exclusive."""
        low, high = ((edge / self.timesteps) ** (1 / self.exponent) for edge in (first, end))
        return high - low


def build_density(name: str, train_timesteps: int, exponent: float = 1 / 3) -> Density:
    """Build the density of a name.

    Args:
        name: ``uniform``; or ``high_noise``, that of ``T u ** exponent``, which leans towards high
            noise, where layout and background are decided.
        train_timesteps: T, the number of timesteps.
        exponent: exponent of ``high_noise``, above 0; 1 is uniform.

    Raises:
        InvDiffError: if there is no such density.
    """
    require_density(name, exponent)
    return Density(train_timesteps, 1.0 if name == "uniform" else exponent)


def require_density(name: str, exponent: float) -> None:
    """Check the arguments of :func:`build_density`.

    Raises:
        InvDiffError: naming the setting that is wrong.
    """
    require_name("timestep_density", name, DENSITIES)
    if exponent <= 0:
        raise InvDiffError(
            f"high_noise_exponent={exponent}: expected more than 0.", "high_noise_exponent"
        )


def min_snr_weights(process: NoiseProcess, timesteps: Tensor, gamma: float) -> Tensor:
    """Compute loss weights by min-SNR weighting (Hang et al., arXiv 2303.09556).

    They limit the weight ``SNR`` that a loss on ``x0`` would have to ``gamma``: ``min(SNR, gamma)``
    over ``SNR`` for epsilon-prediction, over ``SNR + 1`` for v-prediction and over
    ``(1 + sqrt(SNR))^2`` for flow matching. At a zero-SNR end the latter two are 0.

    Args:
        process: noise process, which gives the signal-to-noise ratio and the prediction type.
        timesteps: int64 ``[B]``.
        gamma: limit of the weight, 5 in the paper.

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
