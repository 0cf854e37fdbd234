"""Adapters on a UNet of Stable Diffusion 2.x's form: linear projections, other heads a level."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from invdiff_pl.adapters import build_adapter
from invdiff_pl.backbones.noising import predict

KINDS = {
    "lora": {},
    "small_unet": {"ratio": 0.5},
    "bottleneck": {"ratio": 0.5},
    "unet_copy": {},
}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=(2, 4, 4, 4),
        use_linear_projection=True,
        norm_num_groups=8,
    )
    return made.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_on_a_unet_of_the_second_version(kind: str, unet) -> None:
    frozen = {name: value.clone() for name, value in unet.state_dict().items()}
    copy = UNet2DConditionModel.from_config(unet.config).requires_grad_(False).eval()
    copy.load_state_dict(frozen)
    given = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 7, 48)
    with torch.no_grad():
        before = unet(*given).sample
    adapter = build_adapter(kind, copy, **KINDS[kind])
    adapter.enable_gradient_checkpointing()
    prediction = predict(adapter.denoiser, *given)
    expected = 0.5 * before if kind == "unet_copy" else before  # which blends by r = 1/2
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    trained = list(adapter.parameters().values())
    gradients = torch.autograd.grad(prediction.square().sum(), trained, allow_unused=True)
    assert any(value is not None and bool(value.any()) for value in gradients)
    after = adapter.frozen_weights()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
