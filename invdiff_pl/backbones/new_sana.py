"""A new, untrained Sana of any size: a flow-matching transformer that trains on a CPU.

Sana (Xie et al., arXiv 2410.10629) has linear attention, depthwise convolutions in its feed-forward
layers, and a causal language model as its text encoder.
"""

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import CLIPTokenizer, Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from invdiff_pl.backbones.architecture import Architecture

# Number of tokens per prompt that the pipeline's call takes.
_MAX_TOKENS = 300


def new_sana(architecture: Architecture, tokenizer: CLIPTokenizer) -> SanaPipeline:
    """Build the pipeline, with weights drawn from torch's random state.

    Args:
        architecture: sizes of the pipeline.
        tokenizer: a tokenizer that knows the words of the prompts.
    """
    return SanaPipeline(
        tokenizer=_tokenizer(tokenizer),
        text_encoder=_text_encoder(architecture, tokenizer),
        vae=_autoencoder(architecture),
        transformer=_transformer(architecture),
        # Few tokens need no shift towards noise (Esser et al., arXiv 2403.03206).
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        ),
    )


def _tokenizer(tokenizer: CLIPTokenizer) -> PreTrainedTokenizerFast:
    """Convert a tokenizer to the class that accepts Sana's long instructions."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
    )


def _text_encoder(architecture: Architecture, tokenizer: CLIPTokenizer) -> Gemma2Model:
    width = architecture.text_width
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        # It is never trained; layers that preserve the scale of their input keep words distinct.
        initializer_range=width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Gemma2Model(config)


def _autoencoder(architecture: Architecture) -> AutoencoderDC:
    channels = architecture.vae_channels
    levels = len(channels)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=architecture.latent_channels,
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * levels,
        decoder_block_types=("ResBlock",) * levels,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_act_fns="silu",
        scaling_factor=1.0,
    )


def _transformer(architecture: Architecture) -> SanaTransformer2DModel:
    width, heads = architecture.transformer_width, architecture.heads
    return SanaTransformer2DModel(
        sample_size=architecture.latent_side,
        patch_size=architecture.patch_size,
        in_channels=architecture.latent_channels,
        out_channels=architecture.latent_channels,
        num_layers=architecture.transformer_layers,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=width // heads,
        cross_attention_dim=width,
        caption_channels=architecture.text_width,
        interpolation_scale=1.0,
    )
