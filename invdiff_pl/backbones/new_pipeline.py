"""A new, untrained pipeline of any size, from which the small backbones are trained."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from invdiff_pl.backbones.architecture import TINY, Architecture
from invdiff_pl.backbones.new_sana import new_sana
from invdiff_pl.utils.names import NEW_FAMILIES, require_name

_MAX_TOKENS = 16
_VOCABULARY = 1024


def new_pipeline(architecture: Architecture, prompts: Sequence[str], seed: int) -> Any:
    """Build a pipeline with random weights, whose tokenizer knows the words of the prompts.

    Raises:
        InvDiffError: if the family is not one of those that small pipelines are built of.
    """
    require_name("architecture.family", architecture.family, NEW_FAMILIES)
    tokenizer = prompt_tokenizer(prompts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture.family == "sana":
            return new_sana(architecture, tokenizer)
        return _stable_diffusion(architecture, tokenizer)


def _stable_diffusion(
    architecture: Architecture, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Build one with v-prediction, a zero terminal signal-to-noise ratio and trailing timesteps.

    See Salimans & Ho, arXiv 2202.00512; Lin et al., arXiv 2305.08891. Without them a small model
    cannot choose the mean colour of a picture, so it would not learn the data's bias either.
    """
    return StableDiffusionPipeline(
        vae=_autoencoder(architecture),
        text_encoder=_text_encoder(architecture),
        tokenizer=tokenizer,
        unet=_unet(architecture),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_pipeline(prompts: Sequence[str], seed: int = 0) -> StableDiffusionPipeline:
    """Build an untrained pipeline for 32×32 images, small enough for examples and tests.

    Args:
        prompts: prompts whose words its tokenizer knows.
        seed: seed of its weights.

    Example:
        >>> pipe = tiny_pipeline(["a photo of a nurse"])
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe("a photo of a nurse", num_inference_steps=1).images[0].size
        (32, 32)
    """
    return new_pipeline(TINY, prompts, seed)


def _unet(architecture: Architecture) -> UNet2DConditionModel:
    levels = len(architecture.unet_channels)
    plain = levels - architecture.attention_levels
    down = ["DownBlock2D"] * plain + ["CrossAttnDownBlock2D"] * architecture.attention_levels
    up = [block.replace("Down", "Up") for block in reversed(down)]
    return UNet2DConditionModel(
        sample_size=architecture.latent_side,
        in_channels=architecture.latent_channels,
        out_channels=architecture.latent_channels,
        block_out_channels=architecture.unet_channels,
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=architecture.text_width,
        attention_head_dim=architecture.heads,
        norm_num_groups=16,
    )


def _autoencoder(architecture: Architecture) -> AutoencoderKL:
    levels = len(architecture.vae_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=architecture.vae_channels,
        layers_per_block=1,
        latent_channels=architecture.latent_channels,
        sample_size=architecture.resolution,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def _text_encoder(architecture: Architecture) -> CLIPTextModel:
    width = architecture.text_width
    # Tokens: 0 <|startoftext|>, 1 <|endoftext|>, as prompt_tokenizer numbers them.
    config = CLIPTextConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_MAX_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def prompt_tokenizer(prompts: Sequence[str], most_tokens: int = _MAX_TOKENS) -> CLIPTokenizer:
    """Train a CLIP tokenizer, whose byte-pair merges are learned from the prompts.

    Args:
        prompts: prompts whose words it knows.
        most_tokens: number of tokens to which prompts are padded or cut.
    """
    tokenizer = Tokenizer(BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(ByteLevel.alphabet())
    # Last letters are given beforehand, since the trainer would number those it meets in the order
    # of a hash table, which differs from one process to the next.
    last_letters = [f"{letter}</w>" for letter in alphabet]
    trainer = BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=alphabet,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *last_letters],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    words = [word for prompt in prompts for word in prompt.split()]
    tokenizer.train_from_iterator(words, trainer)
    with tempfile.TemporaryDirectory() as folder:
        _, merges = tokenizer.model.save(folder)
        known = dict(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
        lines = Path(merges).read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    return CLIPTokenizer(vocab=known, merges=pairs, model_max_length=most_tokens)
