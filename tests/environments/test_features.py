"""Features of a frozen denoiser's block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.features import middle_features
from invdiff_pl.backbones.noising import ForwardProcess
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.environments.features import BlockFeatures, image_features, middle_block


@pytest.fixture(scope="module")
def pipeline(tiny_backbone: Path) -> Any:
    return load_pipeline(str(tiny_backbone))


@pytest.fixture(scope="module")
def latents(pipeline: Any) -> Tensor:
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    return torch.randn(7, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_features_are_those_of_the_middle_block(pipeline: Any, latents: Tensor) -> None:
    process = ForwardProcess(pipeline.scheduler.config)
    found = image_features(pipeline, latents, levels=[0.3, 0.7], seed=5)
    noise = torch.randn(latents.shape[1:], generator=generator(5, "feature noise"))
    expected = [
        middle_features(
            pipeline.unet,
            process,
            latents,
            int(level * process.train_timesteps),
            noise,
            frozen_denoiser(pipeline).condition([""])["prompt_embeds"],
        )
        for level in (0.3, 0.7)
    ]
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
    with pytest.raises(ValueError, match=r"block='middle'.*mid_block"):
        image_features(pipeline, latents, block="middle")
    with pytest.raises(ValueError, match=r"levels=\[1.5\]"):
        image_features(pipeline, latents, levels=[1.5])


def test_image_tokens_of_a_transformer_are_pooled_like_a_grid() -> None:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()

    class Called(nn.Module):
        """Called as a UNet, it gives its class labels itself."""

        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = transformer.transformer_blocks
            self.inner = transformer

        def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, **_: Any) -> Any:
            return self.inner(noisy, timesteps, torch.zeros(len(noisy), dtype=torch.long))

    assert middle_block(Called()) == "transformer_blocks.1"
    process = ForwardProcess(DDPMScheduler(num_train_timesteps=100).config)
    kept: list[Tensor] = []
    handle = transformer.transformer_blocks[1].register_forward_hook(
        lambda block, given, output: kept.append(output)
    )
    reader = BlockFeatures(Called(), process, torch.zeros(1, 1, 4), levels=[0.5])
    found = reader(torch.randn(3, 4, 8, 8))
    handle.remove()
    grid = kept[0].transpose(1, 2).reshape(3, 8, 4, 4)
    expected = torch.cat(
        [grid.mean((2, 3)), nn.functional.adaptive_avg_pool2d(grid, 2).flatten(1)], dim=1
    )
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_features_beyond_half_precision_are_refused(pipeline: Any, latents: Tensor) -> None:
    broken = latents.clone()
    broken[2] = torch.inf
    with pytest.raises(ValueError, match="image 2 of the batch"):
        image_features(pipeline, broken)
