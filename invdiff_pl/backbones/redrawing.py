"""Redrawing images from half of the noise, under guidance, to show clearly what prompts name."""

import torch
from torch import Tensor

from invdiff_pl.backbones.denoiser import (
    Condition,
    FrozenDenoiser,
    repeated,
)
from invdiff_pl.backbones.latents import encoded_moments
from invdiff_pl.backbones.noising import NoiseProcess, timestep_at

# As a logarithm of the signal-to-noise ratio, about half of all timesteps of Stable Diffusion.
HALF = -1.0


def clean_and_noise(
    process: NoiseProcess, noisy: Tensor, prediction: Tensor, timestep: int
) -> tuple[Tensor, Tensor]:
    """Compute the clean latents and the noise that a prediction implies for noisy latents.

    Noisy latents ``a x + s e`` and the target ``p x + q e`` are two equations in ``x`` and ``e``,
    whatever the prediction type.

    Args:
        process: noise process of the prediction.
        noisy: noisy latents ``[B, C, h, w]``.
        prediction: prediction of the process's target, ``[B, C, h, w]``.
        timestep: timestep of all images.

    Returns:
        latents ``x`` and noise ``e``, float32 ``[B, C, h, w]``.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> from invdiff_pl.backbones.noising import noise_process
        >>> process = noise_process(DDPMScheduler(prediction_type="v_prediction").config)
        >>> latents, noise = torch.randn(2, 1, 4, 8, 8)
        >>> at = torch.tensor([300])
        >>> noisy = process.add_noise(latents, noise, at)
        >>> found = clean_and_noise(process, noisy, process.target(latents, noise, at), 300)
        >>> [torch.allclose(*pair, atol=1e-4) for pair in zip(found, (latents, noise))]
        [True, True]
    """
    at = torch.full((1,), timestep, device=noisy.device)
    none, one = noisy.new_zeros((1, 1, 1, 1)).float(), noisy.new_ones((1, 1, 1, 1)).float()
    a, s = process.add_noise(one, none, at), process.add_noise(none, one, at)
    p, q = process.target(one, none, at), process.target(none, one, at)
    noisy, prediction, both = noisy.float(), prediction.float(), a * q - s * p
    return (q * noisy - s * prediction) / both, (a * prediction - p * noisy) / both


@torch.no_grad()
def redrawn(
    denoiser: FrozenDenoiser,
    images: Tensor,
    condition: Condition,
    null: Condition,
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """Noise images halfway through the process and denoise them from there, under guidance.

    With so little noise an image keeps its layout, so that guidance draws more clearly what the
    prompt names and hardly changes what it does not name.

    Args:
        denoiser: a denoiser whose autoencoder encodes and decodes the images.
        images: float ``[B, 3, H, W]`` in [-1, 1].
        condition: the encoded prompts, one row per image.
        null: the encoded empty prompt, one row.
        noise: ``[B, C, h, w]``.
        steps: number of steps of the whole process, of which the last ones are taken;
            deterministic (DDIM, Song et al., arXiv 2010.02502).
        guidance_scale: scale of classifier-free guidance, above 0.

    Returns:
        images, float32 ``[B, 3, H, W]`` in [-1, 1], on the given images' device.
    """
    device, process = denoiser.network.device, denoiser.process
    first = timestep_at(process, HALF)
    own = {name: rows.to(device) for name, rows in condition.items()}
    nothing = repeated(null, len(images), device)
    latents = denoiser.latents(encoded_moments(denoiser.pipe.vae, images)).to(device)
    noise = noise.to(device)
    count = max(1, round(steps * first / process.train_timesteps))
    places = torch.linspace(first, 0, count + 1).round().long().tolist()
    for timestep in places[:-1]:
        at = torch.full((len(latents),), timestep, device=device)
        noisy = process.add_noise(latents, noise, at)
        free = denoiser.predict(noisy, at, nothing).float()
        asked = denoiser.predict(noisy, at, own).float()
        prediction = free + guidance_scale * (asked - free)
        latents, noise = clean_and_noise(process, noisy, prediction, timestep)
    return denoiser.decoded(latents).to(images.device)
