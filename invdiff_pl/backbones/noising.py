"""The forward process and the training target of a diffusers scheduler."""

from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from invdiff_pl.backbones.check import PREDICTION_TYPES
from invdiff_pl.utils.errors import InvDiffError


class ForwardProcess:
    """Noises latents and gives targets, as the scheduler's configuration defines them.

    Args:
        scheduler_config: the ``config`` of any diffusers scheduler of the backbone.

    Raises:
        InvDiffError: if the prediction type is none of epsilon, v_prediction and sample.
    """

    def __init__(self, scheduler_config: FrozenDict) -> None:
        self._scheduler = DDPMScheduler.from_config(scheduler_config)
        self.prediction_type: str = self._scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise InvDiffError(
                f"prediction_type {self.prediction_type!r} of the backbone's scheduler is not "
                f"supported: expected one of {', '.join(PREDICTION_TYPES)}."
            )

    @property
    def train_timesteps(self) -> int:
        """Number of timesteps T of the forward process."""
        return int(self._scheduler.config.num_train_timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``z_t`` for latents and noise ``[B, C, H, W]`` and timesteps ``[B]``."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, ``[B, C, H, W]``: noise, velocity or latents."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        velocity: Tensor = self._scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio at each timestep, float32 ``[B]``; 0 at a zero-SNR end."""
        alphas = self._scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas / (1 - alphas)


def predict(denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
    """Prediction of a denoiser, which is given latents and embeddings in its own precision.

    Args:
        denoiser: a ``UNet2DConditionModel``, or what is called as one and has its ``dtype``.
        noisy: latents ``[B, C, H, W]``.
        timesteps: int64 ``[B]``.
        embeddings: text embeddings ``[B, L, D]``.

    Returns:
        ``[B, C, H, W]``, in the denoiser's dtype, or autocast's.
    """
    dtype = denoiser.dtype
    given = noisy.to(dtype), timesteps, embeddings.to(dtype)
    prediction: Tensor = denoiser(*given, return_dict=False)[0]
    return prediction


def sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Per-sample denoising loss: the mean square over channels and pixels, float32 ``[B]``."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def sample_posterior(moments: Tensor, noise: Tensor | None, scaling_factor: float) -> Tensor:
    """Latents from the VAE posterior's moments.

    Args:
        moments: ``[B, 2C, H, W]``: mean and log variance.
        noise: standard normal ``[B, C, H, W]``; ``None`` takes the posterior's mean.
        scaling_factor: the VAE's, so that latents have unit variance.

    Returns:
        float32 ``[B, C, H, W]``.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    if noise is not None:
        mean = mean + noise * torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return mean * scaling_factor
