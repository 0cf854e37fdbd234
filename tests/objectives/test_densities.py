"""Timestep densities: shares by counting, edges, and min-SNR against the paper's formulas."""

import pytest
import torch
from diffusers import DDPMScheduler

from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.noising import ForwardProcess
from invdiff_pl.objectives import build_density, min_snr_weights
from invdiff_pl.utils.errors import InvDiffError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("high_noise", [(k / 4) ** 3 - ((k - 1) / 4) ** 3 for k in range(1, 5)]),
    ],
)
def test_draws_follow_the_density_and_its_masses(name: str, expected: list[float]) -> None:
    density = build_density(name, 1000, exponent=1 / 3)
    timesteps = density.sample(40_000, generator(0, "test"))
    quarters = (timesteps // 250).bincount(minlength=4).double() / len(timesteps)
    assert quarters.tolist() == pytest.approx(expected, abs=0.005)
    masses = [density.mass(250 * k, 250 * (k + 1)) for k in range(4)]
    assert masses == pytest.approx(expected)


def test_every_stratum_of_a_batch_is_drawn_from_once() -> None:
    timesteps = build_density("uniform", 1000).sample(10, generator(3, "test")).sort().values
    assert (timesteps // 100).tolist() == list(range(10))


def test_a_name_or_an_exponent_that_is_none_is_refused() -> None:
    with pytest.raises(InvDiffError, match="timestep_density=high"):
        build_density("high", 1000)
    with pytest.raises(InvDiffError, match="exponent=0"):
        build_density("high_noise", 1000, exponent=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_the_papers(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    timesteps = torch.tensor([0, 300, 999])
    alphas = scheduler.alphas_cumprod[timesteps]
    ratio = alphas / (1 - alphas)
    limited = torch.minimum(ratio, torch.tensor(5.0))
    expected = {
        "epsilon": limited / ratio,
        "v_prediction": limited / (ratio + 1),
        "sample": limited,
    }
    found = min_snr_weights(ForwardProcess(scheduler.config), timesteps, 5.0)
    torch.testing.assert_close(found, expected[kind])
    assert ratio[0] > 5 > ratio[2]


def test_min_snr_weights_are_finite_where_there_is_no_signal() -> None:
    config = {"rescale_betas_zero_snr": True}
    last = torch.tensor([999])
    for kind, expected in (("epsilon", 1.0), ("v_prediction", 0.0)):
        process = ForwardProcess(DDPMScheduler(prediction_type=kind, **config).config)
        assert min_snr_weights(process, last, 5.0).item() == pytest.approx(expected, abs=1e-6)
