"""Images drawn anew from half of the noise, under guidance."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.latents import encoded_moments, scaled_latents, unscaled_latents
from invdiff_pl.backbones.new_pipeline import tiny_pipeline
from invdiff_pl.backbones.noising import noise_process
from invdiff_pl.backbones.redrawing import clean_and_noise, redrawn

PROMPTS = ["a nurse", "a pilot"]


@pytest.mark.parametrize(
    "config",
    [
        *(
            DDPMScheduler(prediction_type=kind).config
            for kind in ("epsilon", "sample", "v_prediction")
        ),
        FlowMatchEulerDiscreteScheduler(shift=3.0).config,
    ],
)
def test_an_exact_prediction_tells_the_latents_and_the_noise(config) -> None:
    process = noise_process(config)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in (50, 500, 800):
        at = torch.full((3,), timestep)
        noisy, target = (make(latents, noise, at) for make in (process.add_noise, process.target))
        found = clean_and_noise(process, noisy, target, timestep)
        torch.testing.assert_close(found, (latents, noise), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.18},
        {"scaling_factor": 0.36, "shift_factor": 0.12},
        {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2], "latents_std": [1.5, 0.7]},
    ],
)
def test_latents_are_decoded_as_they_were_encoded(config) -> None:
    mean = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    scaled = scaled_latents(config, torch.cat([mean, torch.zeros_like(mean)], dim=1))
    torch.testing.assert_close(unscaled_latents(config, scaled), mean)


def test_a_denoiser_that_knows_the_image_draws_it_again() -> None:
    denoiser = frozen_denoiser(tiny_pipeline(PROMPTS))
    images = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    conditions = denoiser.condition([*PROMPTS, ""])
    own, null = ({n: rows[part] for n, rows in conditions.items()} for part in ([0, 1], [2]))
    latents = denoiser.latents(encoded_moments(denoiser.pipe.vae, images))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    asked: list[Tensor] = []

    def knowing(noisy, timesteps, condition, network=None) -> Tensor:
        asked.append(timesteps)
        return denoiser.process.target(latents, noise, timesteps)

    denoiser.predict = knowing  # type: ignore[method-assign]
    found = redrawn(denoiser, images, own, null, noise, steps=10, guidance_scale=3.0)
    with torch.no_grad():
        config, vae = denoiser.pipe.vae.config, denoiser.pipe.vae
        expected = vae.decode(unscaled_latents(config, latents)).sample.clamp(-1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    steps = torch.stack(asked)[::2, 0]  # with and without the prompt at each
    assert (steps.diff() < 0).all()
    assert 3 <= len(steps) <= 7  # about half of the process, so of the steps
