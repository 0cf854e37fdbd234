"""LoRA layers that are trained folded into the weights: peft's results by fewer operations."""

from typing import Any

import pytest
import torch
from adapter_cases import disturb, inputs
from peft.tuners import lora
from torch import Tensor

from invdiff_pl.adapters import Adapter, build_adapter
from invdiff_pl.adapters.lora import NAME
from invdiff_pl.adapters.low_rank import FoldedConv2d, FoldedLinear
from invdiff_pl.backbones.noising import predict
from invdiff_pl.backbones.pipeline import load_pipeline

EVERYTHING = ["attention", "convolution", "time", "input_output"]


def _adapters(backbone: Any, **settings: Any) -> list[Adapter]:
    """Two alike, peft's and one that is made ready to be trained."""
    settings = {"rank": 3, "layers": EVERYTHING, **settings}
    found = []
    for _ in range(2):
        unet = load_pipeline(str(backbone)).unet.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(build_adapter("lora", unet, **settings))
        disturb(found[-1])
    found[1].prepare_training()
    return found


def _gradients(adapter: Adapter) -> tuple[Tensor, dict[str, Tensor]]:
    noisy, timesteps, text = inputs()
    noisy.requires_grad_()
    prediction = predict(adapter.denoiser, noisy, timesteps, text)
    trained = {**adapter.parameters(), "the input": noisy}
    found = torch.autograd.grad(prediction.square().sum(), list(trained.values()))
    return prediction.detach(), dict(zip(trained, found, strict=True))


def _kinds(adapter: Adapter) -> set[type]:
    return {type(m) for m in adapter.network.modules() if isinstance(m, lora.LoraLayer)}


def _assert_alike(ours: Tensor, plain: Tensor, largest: Tensor) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6 * float(largest))


@pytest.mark.parametrize("settings", [{}, {"alpha": 7.5}])
def test_predictions_and_gradients_are_those_of_pefts_layers(tiny_backbone, settings) -> None:
    plain, folded = _adapters(tiny_backbone, **settings)
    assert _kinds(plain) == {lora.Linear, lora.Conv2d}
    assert _kinds(folded) == {FoldedLinear, FoldedConv2d}
    (expected, theirs), (found, ours) = _gradients(plain), _gradients(folded)
    _assert_alike(found, expected, expected.abs().max())
    assert ours.keys() == theirs.keys()
    largest = torch.stack([gradient.abs().max() for gradient in theirs.values()]).max()
    for name, gradient in theirs.items():
        _assert_alike(ours[name], gradient, largest)


def test_at_scale_0_the_prediction_is_the_frozen_one_bit_for_bit(tiny_backbone) -> None:
    _, folded = _adapters(tiny_backbone)
    folded.set_scale(0.0)
    frozen = load_pipeline(str(tiny_backbone)).unet
    assert torch.equal(predict(folded.denoiser, *inputs()), predict(frozen, *inputs()))


def test_beside_another_lora_both_are_computed(tiny_backbone) -> None:
    plain, folded = _adapters(tiny_backbone)
    for adapter in (plain, folded):
        torch.manual_seed(1)
        config = lora.LoraConfig(r=1, target_modules=["to_q"], init_lora_weights=False)
        adapter.network.add_adapter(config, adapter_name="another")
        adapter.network.set_adapters(["another", NAME])
    assert torch.equal(predict(folded.denoiser, *inputs()), predict(plain.denoiser, *inputs()))


def test_in_half_precision_layers_compute_as_pefts_do(tiny_backbone) -> None:
    plain, folded = _adapters(tiny_backbone)
    with torch.autocast("cpu", torch.bfloat16):
        (expected, theirs), (found, ours) = _gradients(plain), _gradients(folded)
    assert torch.equal(found, expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
