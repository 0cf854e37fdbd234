"""The published architecture: sizes and operations counted by others."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from invdiff_pl.diffusion.stable_diffusion import (
    stable_diffusion_text_encoder,
    stable_diffusion_unet,
    stable_diffusion_vae,
)


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (stable_diffusion_unet, 859_520_964),
        (stable_diffusion_vae, 83_653_863),
        (stable_diffusion_text_encoder, 123_060_480),
    ],
)
def test_parts_have_the_published_number_of_parameters(build, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(value.numel() for value in build().parameters()) == parameters


def test_a_forward_pass_of_the_unet_takes_0_80_tflop_an_image_at_64_x_64_latents() -> None:
    with torch.device("meta"):
        unet = stable_diffusion_unet()
        given = torch.empty(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.empty(1, 77, 768)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*given)
    # Multiplications and additions counted apart.
    assert counter.get_total_flops() == pytest.approx(0.80e12, rel=0.01)
