"""Targets where the noise is little: what the frozen denoiser predicts."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from invdiff_pl.adapters import build_adapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.new_pipeline import tiny_pipeline
from invdiff_pl.backbones.noising import timestep_at
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.modules import InvariantAdapter
from invdiff_pl.modules.anchoring import Draw, anchored

PROMPTS = ["a mallard", "a cardinal"]
BEFORE = 500
TIMESTEPS = torch.tensor([0, 499, 500, 999])
KINDS = pytest.mark.parametrize(
    ("kind", "settings"),
    [("lora", {}), ("small_unet", {"ratio": 0.5}), ("bottleneck", {}), ("unet_copy", {})],
)


def _draw(condition: dict[str, Tensor]) -> Draw:
    noisy, target = torch.randn((2, 4, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 1, 0, 1])
    return Draw(noisy, TIMESTEPS, {name: value[rows] for name, value in condition.items()}, target)


@KINDS
def test_targets_of_little_noise_are_predictions_of_the_denoiser_alone(kind, settings) -> None:
    pipe = tiny_pipeline(PROMPTS)
    frozen, alone = frozen_denoiser(pipe), copy.deepcopy(pipe.unet)
    adapter = build_adapter(kind, frozen.network, **settings)
    with torch.no_grad():
        for value in adapter.parameters().values():
            value.add_(torch.full_like(value, 0.05))  # as after some training
    draw = _draw(frozen.condition(PROMPTS))
    given = draw.noisy, draw.timesteps, draw.condition

    def adapted() -> Tensor:
        return frozen.predict(*given, adapter.denoiser)

    before = adapted()
    target = anchored(draw, frozen, adapter, BEFORE).target
    with torch.no_grad():
        own = alone(draw.noisy, draw.timesteps, draw.condition["prompt_embeds"]).sample
    torch.testing.assert_close(target[:2], own[:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(target[2:], draw.target[2:])
    assert not target.requires_grad
    # The adapter is as it was, and is trained.
    assert torch.equal(adapted(), before)
    assert not torch.allclose(before[:2], own[:2], atol=1e-3)
    (adapted() - target).square().mean().backward()
    assert all(value.grad is not None for value in adapter.parameters().values())


def test_where_the_noise_is_much_in_all_draws_nothing_is_predicted() -> None:
    frozen = frozen_denoiser(tiny_pipeline(PROMPTS))
    adapter = build_adapter("lora", frozen.network)
    draw = _draw(frozen.condition(PROMPTS))
    assert anchored(draw, frozen, adapter, 0) is draw


def test_the_level_is_one_of_the_signal_to_noise_ratio(tiny_backbone: Path) -> None:
    module = InvariantAdapter(str(tiny_backbone), anchored_from=-2.0)
    assert module.anchored_before == timestep_at(module.process, -2.0) > 0
    assert InvariantAdapter(str(tiny_backbone)).anchored_before == 0


def test_an_untrained_lora_loses_nothing_where_it_is_anchored(tiny_backbone: Path) -> None:
    module = InvariantAdapter(str(tiny_backbone))
    draw = _draw(frozen_denoiser(load_pipeline(str(tiny_backbone))).condition(PROMPTS))
    whole = anchored(draw, module.frozen, module.adapter, 1000)
    prediction = module.frozen.predict(*draw[:3], module.adapter.denoiser)
    torch.testing.assert_close(prediction, whole.target, rtol=1e-4, atol=1e-5)
