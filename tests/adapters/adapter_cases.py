"""What the tests of adapters share."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from invdiff_pl.adapters import Adapter, build_adapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import load_pipeline, sample_images
from invdiff_pl.backbones.prompts import Conditions

PROMPT = "a photo of a mallard"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "small_unet": {"ratio": 0.5},
    "bottleneck": {"ratio": 0.2},
    "unet_copy": {},
}


def run_folder(folder: Path, backbone: Path | str, kind: str) -> Path:
    """A run folder with an adapter whose weights have been moved."""
    adapter = build_adapter(kind, frozen_unet(backbone), **KINDS[kind])
    disturb(adapter)
    (folder / "adapter" / "adapter").mkdir(parents=True)
    adapter.save(folder / "adapter" / "adapter", trained=True)
    config = {
        "experiment": {"name": "waterbirds"},
        "seed_everything": 0,
        "trainer": {"max_steps": 10},
        "model": {"init_args": {"backbone": str(backbone), "lambda_": 1.0}},
        "data": {"init_args": {"resolution": 32, "batch_size": 48}},
    }
    record = {"config": config, "revision": "abc", "hardware": "2 cores"}
    (folder / "adapter" / "stage.json").write_text(json.dumps(record))
    environments = {"prompts": [PROMPT], "images": 9, "groups": 2, "features": "block"}
    (folder / "environments").mkdir()
    (folder / "environments" / "environments.json").write_text(json.dumps(environments))
    return folder


@functools.cache
def _loaded(backbone: str, dtype: torch.dtype) -> UNet2DConditionModel:
    return load_pipeline(backbone, str(dtype).removeprefix("torch.")).unet


def frozen_unet(backbone: Path | str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The denoiser of a pipeline folder, to be changed as a test likes."""
    return copy.deepcopy(_loaded(str(backbone), dtype))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and text embeddings for the tiny backbone."""
    source = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, 4, 16, 16, generator=source),
        torch.tensor([1, 500, 999]),
        torch.randn(3, 7, 16, generator=source),
    )


def disturb(adapter: Adapter) -> None:
    """Move every trainable weight, as training would."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))


@torch.no_grad()
def draw_images(pipeline: StableDiffusionPipeline) -> Tensor:
    """Two images of one prompt, uint8."""
    conditions = Conditions(frozen_denoiser(pipeline).condition(["a photo of a mallard", ""]))
    return sample_images(
        pipeline,
        conditions[torch.zeros(2, dtype=torch.int64)],
        conditions.null,
        [4, 5],
        seed=3,
        steps=3,
        guidance_scale=2.0,
    )
