"""The published architecture of Stable Diffusion 1.4, with random weights.

It serves tests, benchmarks and rehearsals of large runs where the weights are not available: every
tensor has the size of the real one. Sizes are from the configuration files of the published
pipeline folder (Rombach et al., arXiv 2112.10752).
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from invdiff_pl.backbones.new_pipeline import prompt_tokenizer

# Side of the images and of their latents, channels of the latents, tokens of a prompt, text width.
RESOLUTION = 512
LATENT_SIDE = 64
LATENT_CHANNELS = 4
TOKENS = 77
TEXT_WIDTH = 768
_GROUPS = 32


def stable_diffusion_unet(thinner: int = 1) -> UNet2DConditionModel:
    """Build the denoiser: 859,520,964 parameters, 0.80 TFLOP per image and pass at 64×64 latents.

    Args:
        thinner: divisor of all channels (320, 640 and 1280) and of the text's width: 1, 2, 5 or 10.
    """
    _require_divisor(thinner)
    channels = 320 // thinner, 640 // thinner, 1280 // thinner, 1280 // thinner
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=2,
        cross_attention_dim=_text_width(thinner),
        attention_head_dim=8,
        norm_num_groups=_GROUPS if channels[0] % _GROUPS == 0 else 8,
    )


def stable_diffusion_vae(thinner: int = 1) -> AutoencoderKL:
    """Build the autoencoder: 83,653,863 parameters, 8×8 pixels per pixel of the latents."""
    _require_divisor(thinner)
    # The nearest power of two: these channels are powers of two themselves.
    narrow = 1 << (thinner.bit_length() - 1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width // narrow for width in (128, 256, 512, 512)),
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
        sample_size=RESOLUTION,
        norm_num_groups=_GROUPS // narrow,
        scaling_factor=0.18215,
    )


def stable_diffusion_text_encoder(thinner: int = 1) -> CLIPTextModel:
    """Build the text encoder of CLIP ViT-L/14: 123,060,480 parameters."""
    width = _text_width(thinner)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu",
        # As the tokenizer made here numbers <|startoftext|> and <|endoftext|>.
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def random_stable_diffusion(
    prompts: Sequence[str], seed: int, thinner: int = 1
) -> StableDiffusionPipeline:
    """Build a whole pipeline with random weights, whose tokenizer knows the words of the prompts.

    Args:
        prompts: prompts from which the tokenizer's merges are learned.
        seed: seed of the weights.
        thinner: divisor of the channels; 1 is the published size, 4.3 GB in float32.
    """
    scheduler: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return StableDiffusionPipeline(
            vae=stable_diffusion_vae(thinner),
            text_encoder=stable_diffusion_text_encoder(thinner),
            tokenizer=prompt_tokenizer(prompts, TOKENS),
            unet=stable_diffusion_unet(thinner),
            scheduler=PNDMScheduler(**scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _text_width(thinner: int) -> int:
    # A multiple of the twelve heads.
    return TEXT_WIDTH if thinner == 1 else 12 * (TEXT_WIDTH // 12 // thinner)


def _require_divisor(thinner: int) -> None:
    if thinner not in (1, 2, 5, 10):
        raise ValueError(f"thinner={thinner}: expected 1, 2, 5 or 10")
