"""The forward process against its textbook formulas."""

import pytest
import torch
from diffusers import DDIMScheduler

from invdiff_pl.backbones.latents import scaled_latents
from invdiff_pl.backbones.noising import ForwardProcess, sample_losses
from invdiff_pl.utils.errors import InvDiffError


def _process(prediction_type: str) -> tuple[ForwardProcess, torch.Tensor]:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=True,
    )
    return ForwardProcess(scheduler.config), scheduler.alphas_cumprod


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_and_target_follow_the_formulas(prediction_type: str) -> None:
    process, alphas = _process(prediction_type)
    latents, noise = torch.randn(2, 4, 3, 2, 2).unbind(0)
    timesteps = torch.tensor([0, 10, 700, 999])
    signal = alphas[timesteps].sqrt().reshape(-1, 1, 1, 1)
    spread = (1 - alphas[timesteps]).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        process.add_noise(latents, noise, timesteps), signal * latents + spread * noise
    )
    expected = {
        "epsilon": noise,
        "v_prediction": signal * noise - spread * latents,
        "sample": latents,
    }[prediction_type]
    torch.testing.assert_close(process.target(latents, noise, timesteps), expected)


def test_the_last_timestep_holds_no_signal() -> None:
    process, _ = _process("v_prediction")
    assert process.signal_to_noise(torch.tensor([process.train_timesteps - 1])).item() < 1e-6


def test_other_prediction_types_are_refused() -> None:
    config = DDIMScheduler(prediction_type="flow").config
    with pytest.raises(InvDiffError, match="flow"):
        ForwardProcess(config)


def test_a_samples_loss_is_its_own_mean_square() -> None:
    prediction = torch.zeros(2, 1, 2, 2)
    target = torch.stack([torch.full((1, 2, 2), 2.0), torch.tensor([[[0.0, 0.0], [0.0, 4.0]]])])
    assert sample_losses(prediction, target).tolist() == [4.0, 4.0]


def test_posterior_samples_have_the_moments_mean_and_variance() -> None:
    moments = torch.cat([torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 0.5)], 1)
    noise = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    drawn = scaled_latents({"scaling_factor": 2.0}, moments, noise)
    assert drawn.mean().item() == pytest.approx(6.0, abs=0.05)
    assert drawn.std().item() == pytest.approx(2 * torch.tensor(0.25).exp().item(), rel=0.02)
    assert (scaled_latents({"scaling_factor": 2.0}, moments) == 6.0).all()
