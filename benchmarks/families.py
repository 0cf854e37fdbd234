"""What each family's published size costs, counted on empty tensors: no weights, any machine.

    python benchmarks/families.py

It prints one row per model: parameters; operations of one pass over one image at the family's usual
resolution, by PyTorch's counter; their share up to the middle block, where features are taken; and
parameters of a LoRA of rank 16 on the default layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from invdiff_pl.adapters import build_adapter
from invdiff_pl.backbones.check import FAMILIES
from invdiff_pl.backbones.denoiser import FrozenDenoiser
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.environments.features import block_output, middle_block
from invdiff_pl.utils.operations import count_operations

_SD = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
}
_XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
_SD35 = {"sample_size": 128, "qk_norm": "rms_norm", "joint_attention_dim": 4096}
_MEDIUM = {
    **_SD35,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
_LARGE = {
    **_SD35,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
_PIXART = {
    "sample_size": 128,
    "caption_channels": 4096,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
_KLEIN = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_FLOW, _DIFFUSION = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.DDPMScheduler


@dataclass(frozen=True)
class Published:
    """A published model, as far as its denoiser's cost goes.

    Attributes:
        pipeline: name of the pipeline's class.
        config: the denoiser's configuration, where it differs from its class's defaults.
        tokens: number of tokens per prompt.
        width: width of a prompt's embedding.
        pooled: width of the pooled embedding; 0 for none.
        side: side of the images in pixels.
        factor: factor by which the images' side exceeds that of the latents.
    """

    pipeline: str
    config: Mapping[str, Any]
    tokens: int
    width: int
    pooled: int = 0
    side: int = 1024
    factor: int = 8


MODELS = {
    "Stable Diffusion 1.5": Published("StableDiffusionPipeline", _SD, 77, 768, side=512),
    "SDXL 1.0": Published("StableDiffusionXLPipeline", _XL, 77, 2048, 1280),
    "SD 3.5 medium": Published("StableDiffusion3Pipeline", _MEDIUM, 333, 4096, 2048),
    "SD 3.5 large": Published("StableDiffusion3Pipeline", _LARGE, 333, 4096, 2048),
    "FLUX.1 dev": Published("FluxPipeline", {"guidance_embeds": True}, 512, 4096, 768),
    "FLUX.2 [klein] 4B": Published("Flux2KleinPipeline", _KLEIN, 512, 7680),
    "PixArt-Σ XL": Published("PixArtSigmaPipeline", _PIXART, 300, 4096),
    "Sana 1.6B": Published("SanaPipeline", {}, 300, 2304, factor=32),
}


def empty(model: Published) -> FrozenDenoiser:
    """Build a pipeline of nothing but the model's denoiser, which takes no memory."""
    family = FAMILIES[model.pipeline]
    part, kind = family.denoiser
    with torch.device("meta"):
        network = getattr(diffusers, kind)(**model.config).eval()
    pipeline = getattr(diffusers, model.pipeline)
    pipe = pipeline.__new__(pipeline)
    schedule = _FLOW() if part == "transformer" and "PixArt" not in kind else _DIFFUSION()
    for name, value in {
        part: network,
        "scheduler": schedule,
        "vae_scale_factor": model.factor,
    }.items():
        object.__setattr__(pipe, name, value)
    return frozen_denoiser(pipe, model.side)


def given(model: Published, denoiser: FrozenDenoiser) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return empty latents, timestep and condition for one image."""
    condition = {"prompt_embeds": torch.empty(1, model.tokens, model.width, device="meta")}
    if model.pooled:
        condition["pooled_prompt_embeds"] = torch.empty(1, model.pooled, device="meta")
    if "prompt_attention_mask" in denoiser.encoded:
        condition["prompt_attention_mask"] = torch.ones(1, model.tokens, device="meta")
    noisy = torch.empty((1, *denoiser.latent_shape), device="meta")
    return noisy, torch.zeros(1, dtype=torch.int64, device="meta"), condition


def operations(model: Published, denoiser: FrozenDenoiser) -> tuple[int, int]:
    """Count the operations of a pass, and of its part up to the middle block."""
    block = denoiser.network.get_submodule(middle_block(denoiser.network))

    def predict() -> Tensor:
        return denoiser.predict(*given(model, denoiser))

    with torch.no_grad():
        return count_operations(predict), count_operations(lambda: block_output(block, predict))


def main() -> None:
    """Print the table."""
    print("| model | parameters | TFLOP a pass | until the middle block | LoRA, rank 16 |")
    print("| --- " * 5 + "|")
    for name, model in MODELS.items():
        denoiser = empty(model)
        size = sum(value.numel() for value in denoiser.network.parameters())
        whole, half = operations(model, denoiser)
        adapter = build_adapter("lora", denoiser.network.requires_grad_(False), rank=16)
        cells = [f"{size / 1e9:.2f} billion", f"{whole / 1e12:.2f}", f"{half / whole:.0%}"]
        cells.append(f"{adapter.size() / 1e6:.1f} million ({adapter.size() / size:.2%})")
        print("|", " | ".join([name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
