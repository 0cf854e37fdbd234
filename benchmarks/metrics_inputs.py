"""Inputs for the benchmarks of the measures."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from invdiff_pl.backbones.pipeline import load_pipeline

PROMPTS = ("a photo of a mallard", "a photo of a common raven")
BATCH = 128


def pictures(count: int, seed: int, top: int = 256, side: int = 32) -> Tensor:
    """Draw random blobs, uint8 ``[N, 3, side, side]``, smooth so that networks tell them apart."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 4, 4), generator=source) * top
    return functional.interpolate(coarse, side, mode="bicubic").clamp(0, 255).to(torch.uint8)


def small_clip(folder: Path) -> Path:
    """Write a small CLIP model folder with random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, "num_attention_heads": 2, "vocab_size": 1024, "eos_token_id": 1},
        vision_config={**sizes, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return save_clip(config, folder, 32)


def save_clip(config: CLIPConfig, folder: Path, side: int) -> Path:
    """Write a CLIP model folder with random weights, for images of the given side."""
    CLIPModel(config).save_pretrained(folder)
    load_pipeline("asset:waterbirds").tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder
