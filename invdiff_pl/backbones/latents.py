"""Encoding images to latents as a denoiser takes them, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Log-variance given to latents of an autoencoder without a posterior.
_CERTAIN = -30.0


@torch.no_grad()
def encoded_moments(vae: Any, images: Tensor) -> Tensor:
    """Return the moments of an autoencoder's posterior; one without has next to no variance.

    Args:
        vae: a diffusers autoencoder with C latent channels.
        images: float ``[B, 3, H, W]`` in [-1, 1].

    Returns:
        means and log-variances, ``[B, 2C, h, w]``, on the autoencoder's device.
    """
    encoded = vae.encode(images.to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        moments: Tensor = encoded.latent_dist.parameters
        return moments
    return torch.cat([encoded.latent, torch.full_like(encoded.latent, _CERTAIN)], dim=1)


def scaled_latents(
    config: Mapping[str, Any], moments: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Scale latents to about unit variance, as a denoiser takes them.

    Args:
        config: the autoencoder's configuration: a scaling factor, and a shift or means and standard
            deviations.
        moments: ``[B, 2C, h, w]``, as returned by :func:`encoded_moments`.
        noise: standard normal noise ``[B, C, h, w]``; ``None`` takes the posterior's mean.

    Returns:
        float32 ``[B, C, h, w]``.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    if noise is not None:
        mean = mean + noise * torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    shift, scale = _shift_and_scale(config, mean.device)
    return (mean - shift) * scale


def unscaled_latents(config: Mapping[str, Any], latents: Tensor) -> Tensor:
    """Rescale latents of about unit variance for the autoencoder's decoder.

    This is the inverse of :func:`scaled_latents`.
    """
    shift, scale = _shift_and_scale(config, latents.device)
    return latents / scale + shift


def _shift_and_scale(
    config: Mapping[str, Any], device: torch.device
) -> tuple[Tensor | float, Tensor | float]:
    """Return what is subtracted from an autoencoder's latents and what multiplies the result."""
    scale = float(config["scaling_factor"])
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, deviation = (
            torch.tensor(config[name], device=device).reshape(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return mean, scale / deviation
    return float(config.get("shift_factor") or 0.0), scale
