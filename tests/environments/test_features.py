"""Features of a frozen denoiser's block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, made
from torch import Tensor, nn

from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.noising import ForwardProcess, timestep_at
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.environments.features import (
    LEVELS,
    NOISES,
    TIMESTEPS,
    BlockFeatures,
    DenoisingLosses,
    image_features,
    middle_block,
)
from invdiff_pl.utils.errors import InvDiffError


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path) -> Any:
    return load_pipeline(str(tiny_backbone))


@pytest.fixture(scope="module")
def latents(pipeline: Any) -> Tensor:
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    return torch.randn(7, channels, side, side, generator=torch.Generator().manual_seed(0))


def _middle(pipeline: Any, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The middle block's output in a whole pass, over the whole and over quarters."""
    kept: list[Tensor] = []
    handle = pipeline.unet.mid_block.register_forward_hook(lambda *given: kept.append(given[2]))
    null = frozen_denoiser(pipeline).condition([""])["prompt_embeds"]
    with torch.no_grad():
        pipeline.unet(noisy, timesteps, null.expand(len(noisy), -1, -1))
    handle.remove()
    half = kept[0].shape[-1] // 2
    quarters = kept[0].unfold(2, half, half).unfold(3, half, half).mean((4, 5))
    return torch.cat([kept[0].mean((2, 3)), quarters.flatten(1)], dim=1)


def test_features_are_those_of_the_middle_block(pipeline: Any, latents: Tensor) -> None:
    process = ForwardProcess(pipeline.scheduler.config)
    ratios = process.signal_to_noise(torch.tensor([300, 700])).log().tolist()
    found = image_features(pipeline, latents, levels=ratios, seed=5)
    noise = torch.randn(latents.shape[1:], generator=generator(5, "feature noise"))
    expected = []
    for timestep in (300, 700):
        timesteps = torch.full((7,), timestep)
        noisy = process.add_noise(latents, noise.expand_as(latents), timesteps)
        expected.append(_middle(pipeline, noisy, timesteps))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), torch.cat(expected, dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_features_do_not_depend_on_the_batch(
    pipeline: Any, latents: Tensor, batch_size: int
) -> None:
    whole = image_features(pipeline, latents, batch_size=7)
    parts = image_features(pipeline, latents, batch_size=batch_size)
    torch.testing.assert_close(parts, whole, rtol=2e-3, atol=1e-3)
    # Nor on which rank had which images: batches are taken one by one, in any order.
    other = image_features(pipeline, iter([latents[4:], latents[:4]]))
    torch.testing.assert_close(other.roll(4, 0), whole, rtol=2e-3, atol=1e-3)


def test_the_pass_ends_at_the_block(pipeline: Any, latents: Tensor) -> None:
    reached: list[bool] = []
    handle = pipeline.unet.conv_out.register_forward_hook(lambda *_: reached.append(True))
    image_features(pipeline, latents)
    handle.remove()
    assert not reached
    assert not pipeline.unet.mid_block._forward_hooks


def test_any_block_may_be_named(pipeline: Any, latents: Tensor) -> None:
    found = image_features(pipeline, latents, block="conv_in", levels=[0.5])
    assert found.shape == (7, 5 * pipeline.unet.conv_in.out_channels)
    with pytest.raises(InvDiffError, match=r"block='middle'.*mid_block"):
        image_features(pipeline, latents, block="middle")
    with pytest.raises(InvDiffError, match=r"levels=\[nan\]"):
        image_features(pipeline, latents, levels=[float("nan")])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("sd", "sdxl")])
def test_image_tokens_of_a_transformer_are_pooled_like_a_grid(name: str) -> None:
    pipe = made(name)
    denoiser = frozen_denoiser(pipe, 32)
    joint = name in ("lumina2", "zimage")  # of text and image
    assert middle_block(pipe.transformer) == f"{'layers' if joint else 'transformer_blocks'}.1"
    kept: list[Any] = []
    handle = pipe.transformer.get_submodule(middle_block(pipe.transformer)).register_forward_hook(
        lambda block, given, output: kept.append(output)
    )
    latents = denoiser.initial_noise([0, 1, 2], seed=0)[0]
    found = BlockFeatures(denoiser, denoiser.condition([""]), levels=[0.0])(latents)
    handle.remove()
    # The others' patches are of two by two pixels; Lumina 2's latents are smaller.
    side = {"sana": 16, "lumina2": 2}.get(name, 8)
    outputs = kept[0] if isinstance(kept[0], tuple) else (kept[0],)
    if joint:
        outputs = (outputs[0][:, : side**2] if name == "zimage" else outputs[0][:, -(side**2) :],)
    (tokens,) = [each for each in outputs if each is not None and each.shape[1] == side * side]
    grid = tokens.transpose(1, 2).reshape(3, -1, side, side)
    expected = torch.cat(
        [grid.mean((2, 3)), nn.functional.adaptive_avg_pool2d(grid, 2).flatten(1)], dim=1
    )
    torch.testing.assert_close(found, expected)


def test_a_level_means_as_much_noise_under_every_schedule() -> None:
    for name in FAMILIES:
        process = frozen_denoiser(made(name), 32).process
        for level in LEVELS:
            found = process.signal_to_noise(torch.tensor([timestep_at(process, level)])).log()
            assert abs(float(found) - level) < 0.02


def test_features_beyond_half_precision_are_refused(pipeline: Any, latents: Tensor) -> None:
    broken = latents.clone()
    broken[2] = torch.inf
    with pytest.raises(InvDiffError, match=r"image 2 .counted from 0. are not finite in float16"):
        image_features(pipeline, broken)


def test_losses_are_those_of_each_image_under_its_own_prompt(
    pipeline: Any, latents: Tensor
) -> None:
    process = ForwardProcess(pipeline.scheduler.config)
    denoiser = frozen_denoiser(pipeline)
    texts = denoiser.condition([""] * 7)["prompt_embeds"] + torch.arange(7)[:, None, None]
    found = DenoisingLosses(denoiser, seed=3)(latents, {"prompt_embeds": texts})
    assert found.shape == (7, TIMESTEPS * NOISES)
    # The second noise at the first timestep, whose range of 0.24 is cut into four.
    noise = torch.randn(latents.shape[1:], generator=generator(3, "common noise", 0, 1))
    noise = noise.expand_as(latents)
    timesteps = torch.full((7,), int(0.75 * process.train_timesteps))
    noisy = process.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        prediction = pipeline.unet(noisy, timesteps, texts).sample
    expected = (prediction - process.target(latents, noise, timesteps)).square().mean((1, 2, 3))
    torch.testing.assert_close(found[:, 1], expected, rtol=1e-4, atol=1e-5)
