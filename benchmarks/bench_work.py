"""What the benchmarks work on: pictures in files, prompts, and a backbone of either size."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from metrics import pictures
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from invdiff_pl.backbones.architecture import Architecture
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.new_pipeline import new_pipeline
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.data.images import read_images, to_float

SMALL = "asset:waterbirds"
PROMPTS = ("a photo of a mallard", "a photo of a common raven")
# Stable Diffusion 1.4: channels of the UNet and of the VAE, width of the text, side of latents.
SD14: dict[str, Any] = {
    "unet": (320, 640, 1280, 1280),
    "vae": (128, 256, 512, 512),
    "text": (768, 12, 3072),
    "side": 64,
    "heads": 8,
}
# The same in all but size, for tests on a CPU.
THIN: dict[str, Any] = {
    "unet": (32, 32, 32, 32),
    "vae": (32, 32, 32, 32),
    "text": (32, 2, 64),
    "side": 16,
    "heads": 2,
}


def sd_unet(sizes: dict[str, Any]) -> UNet2DConditionModel:
    """Build a UNet with the blocks of Stable Diffusion 1.x, on the context's device.

    Args:
        sizes: ``SD14`` or ``THIN``.
    """
    return UNet2DConditionModel(
        sample_size=sizes["side"],
        block_out_channels=sizes["unet"],
        cross_attention_dim=sizes["text"][0],
        attention_head_dim=sizes["heads"],
    )


def write_sd_backbone(folder: Path, sizes: dict[str, Any], seed: int = 0) -> None:
    """Write a pipeline folder with the architecture of Stable Diffusion 1.4 and random weights."""
    torch.manual_seed(seed)
    width, layers, inner = sizes["text"]
    blocks = len(sizes["vae"])
    # It knows the words of the prompts only, but texts have the real length.
    tokenizer = new_pipeline(Architecture(), PROMPTS, seed).tokenizer
    tokenizer.model_max_length = 77
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            block_out_channels=sizes["vae"],
            layers_per_block=2,
            latent_channels=4,
            sample_size=sizes["side"] * 2 ** (blocks - 1),
            scaling_factor=0.18215,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                intermediate_size=inner,
                num_attention_heads=max(1, width // 64),
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        ),
        tokenizer=tokenizer,
        unet=sd_unet(sizes),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Work:
    """Pictures in files, each with a prompt, and a backbone.

    Attributes:
        folder: folder of pictures and caches.
        backbone: pipeline folder or ``asset:NAME``.
        paths: paths of N pictures.
        batch: batch size of training and scoring, on both sides.
        device: device that everything runs on.
        clock: clock that times waits for data.
        compiled: whether ours compiles the denoiser for scoring and training.
    """

    folder: Path
    backbone: str
    paths: list[Path]
    batch: int
    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    compiled: bool = False

    @classmethod
    def make(cls, folder: Path, backbone: str, images: int, **settings: Any) -> "Work":
        """Draw the pictures."""
        config = load_pipeline(backbone).vae.config
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        paths = [folder / "pictures" / f"{number:06d}.png" for number in range(images)]
        for start in range(0, images, 64):
            chunk = paths[start : start + 64]
            for path, picture in zip(
                chunk, pictures(len(chunk), start, side=config.sample_size), strict=True
            ):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
        return cls(folder, backbone, paths, **settings)

    def pipeline(self) -> StableDiffusionPipeline:
        """Load a new copy of the backbone, frozen, on the device."""
        return load_pipeline(self.backbone).to(self.device)

    @property
    def prompt_ids(self) -> Tensor:
        """Prompt of each picture, int64 ``[N]``."""
        return torch.arange(len(self.paths)) % len(PROMPTS)

    def rows(self) -> list[Tensor]:
        """Return all rows in batches."""
        return list(torch.arange(len(self.paths)).split(self.batch))


class ReferenceInputs:
    """The reference's inputs, for which it reads files and runs VAE and text encoder in every step.

    Args:
        work: pictures and backbone.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.pipeline = work.pipeline()
        self.side = int(self.pipeline.vae.config.sample_size)

    def read(self, rows: Tensor) -> Tensor:
        """Read pictures as the VAE takes them, ``[B, 3, H, W]``, on the device."""
        pixels = read_images([self.work.paths[row] for row in rows.tolist()], self.side)
        return to_float(pixels).to(self.work.device)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pictures to latents ``[B, C, h, w]``, the posterior's means."""
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        return latents

    def embed(self, rows: Tensor) -> Tensor:
        """Compute the text embeddings of the rows' prompts, ``[B, L, D]``."""
        numbers = self.work.prompt_ids[rows].tolist()
        return text_embeddings(self.pipeline, [PROMPTS[number] for number in numbers])


def text_embeddings(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Compute a Stable Diffusion pipeline's text embeddings of prompts, ``[P, L, D]``."""
    return frozen_denoiser(pipeline).condition(prompts)["prompt_embeds"]
