"""What a whole run costs with a published model, counted on empty tensors: no weights, any machine.

    python benchmarks/run_costs.py
    python benchmarks/run_costs.py --images 24000 --prompts 2 --devices 8

Steps, batches, samples and guidance are those of experiments/scales/; operations are PyTorch's
count of matrix products, convolutions and attention. Text encoders (one pass per prompt), networks
that score samples, and pictures drawn during training are left out.
"""

import argparse
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL
from families import MODELS, Published, empty, given, operations
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from invdiff_pl.adapters import build_adapter
from invdiff_pl.backbones.denoiser import FrozenDenoiser
from invdiff_pl.callbacks.calibration import ScaleCalibration
from invdiff_pl.callbacks.heldout import HeldOutSelection
from invdiff_pl.callbacks.resource_estimate import activations
from invdiff_pl.environments.features import LEVELS, block_output, middle_block
from invdiff_pl.utils.operations import count_operations
from invdiff_pl.workflow.experiment import find_file, scale_files
from invdiff_pl.workflow.settings import ScaleSettings

SCALES = {
    "Stable Diffusion 1.5": "sd14",
    "SDXL 1.0": "sdxl",
    "SD 3.5 medium": "sd3",
    "SD 3.5 large": "sd3",
    "FLUX.1 dev": "flux",
}
# Operations per second of dense matrix products in bfloat16, by the vendor's figures.
CARDS = {"A100": 312e12, "H100": 989e12}
UTILISATION = 0.25
SCALES_DRAWN = 2  # before and after
CALIBRATED = 2.5  # scales that calibration tries: two or three
LOOK_STEPS = 12
FLIPS = 2


@dataclass(frozen=True)
class Costs:
    """The costs of a run with one model.

    Attributes:
        fixed: operations of training the adapter, whatever the images and prompts.
        an_image: operations per image, for its latents and features.
        a_prompt: operations per prompt, for its samples at both scales and in looks during
            training.
        weights: bytes on the device, including text encoders and autoencoder.
        activations: bytes of the largest pass in training.
        disk_image: bytes per image, for its latents and features.
        disk_prompt: bytes per prompt, for its samples.
    """

    fixed: float
    an_image: float
    a_prompt: float
    weights: float
    activations: float
    disk_image: float
    disk_prompt: float


def settings_of(scale: str) -> ScaleSettings:
    """Read the settings of a scale as a run does."""
    folder = Path("experiments")
    files: list[Any] = [
        OmegaConf.load(find_file(name, folder)) for name in scale_files(scale, folder)
    ]
    chosen: Any = OmegaConf.merge(*(file.scale for file in files))
    return ScaleSettings(**chosen)


def autoencoder(channels: int) -> AutoencoderKL:
    """Build the autoencoder of Stable Diffusion and its successors, without memory."""
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=channels,
        )


def text_encoders(pipeline: str) -> list[nn.Module]:
    """Build CLIP ViT-L and, depending on the family, OpenCLIP bigG and the encoder of T5 XXL."""
    small = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    large = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20
    )
    words = T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        found: list[nn.Module] = [CLIPTextModel(small)]
        if pipeline in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline"):
            found.append(CLIPTextModel(large))
        if pipeline in ("StableDiffusion3Pipeline", "FluxPipeline"):
            found.append(T5EncoderModel(words))
    return found


class _NoMatrix(torch.autograd.Function):
    """The shapes of attention that keeps no matrix of tokens by tokens, as on GPUs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def training(model: Published, denoiser: FrozenDenoiser, chosen: ScaleSettings) -> tuple[int, int]:
    """Count operations of training on one image, without recomputation, and activation bytes."""
    network = denoiser.network.to(torch.bfloat16).requires_grad_(False)
    adapter = build_adapter("lora", network, **chosen.adapter_settings)
    trained = list(adapter.parameters().values())

    def run(count: int) -> None:
        noisy, timesteps, condition = given(model, denoiser)
        noisy, timesteps = (v.expand(count, *v.shape[1:]) for v in (noisy, timesteps))
        condition = {n: v.expand(count, *v.shape[1:]) for n, v in condition.items()}
        prediction = denoiser.predict(noisy, timesteps, condition)
        torch.autograd.grad(prediction.float().square().mean(), trained, allow_unused=True)

    needed = count_operations(lambda: run(1))
    if chosen.gradient_checkpointing:
        adapter.enable_gradient_checkpointing()
    attention = "torch.nn.functional.scaled_dot_product_attention"
    batch = min(chosen.adapter_batch, chosen.max_micro_batch or chosen.adapter_batch)
    with patch(attention, lambda query, key, value, **_: _NoMatrix.apply(query, key, value)):
        held = activations(run, batch)
    return needed, held


def costs(model: Published, chosen: ScaleSettings) -> Costs:
    """Compute the costs of a run with a model."""
    denoiser = empty(model)
    a_pass, half = operations(model, denoiser)
    channels, *size = denoiser.latent_shape
    width = _features(model, denoiser)
    vae = autoencoder(channels)
    with torch.device("meta"), torch.no_grad():
        encode = count_operations(lambda: vae.encode(torch.empty(1, 3, model.side, model.side)))
        decode = count_operations(lambda: vae.decode(torch.empty(1, channels, *size)))
    weights = 2 * sum(
        value.numel()
        for part in (denoiser.network, vae, *text_encoders(model.pipeline))
        for value in part.parameters()
    )
    trained, held = training(model, denoiser, chosen)
    # A distilled model takes guidance as an input.
    guided = 1 if denoiser.network.config.get("guidance_embeds") else 2
    extra = 0
    if chosen.gradient_checkpointing:
        extra += a_pass
    if chosen.adapter_batch > (chosen.max_micro_batch or chosen.adapter_batch):
        extra += a_pass  # for the penalty, over the whole batch
    held_out, calibration = HeldOutSelection(), ScaleCalibration()
    measured = 1 + ceil(chosen.adapter_steps / chosen.eval_every_n_steps)
    passes: float = chosen.adapter_steps * chosen.adapter_batch * (trained + extra)
    passes += measured * held_out.images * held_out.bins * a_pass
    passes += calibration.images * half
    passes += (
        CALIBRATED
        * chosen.calibration_samples
        * (guided * chosen.calibration_steps * a_pass + half)
    )
    sample = guided * chosen.sampling_steps * a_pass + decode
    looks = (1 + measured) * chosen.eval_samples * (guided * LOOK_STEPS * a_pass + decode)
    drawn = SCALES_DRAWN * chosen.samples_per_prompt
    moments = FLIPS * 2 * channels * size[0] * size[1]
    return Costs(
        fixed=passes,
        an_image=FLIPS * encode + len(LEVELS) * half,
        a_prompt=drawn * sample + looks,
        weights=weights,
        activations=held,
        disk_image=2 * moments + 2 * len(LEVELS) * 5 * width,
        disk_prompt=drawn * 3 * model.side**2 / 2,  # PNG hardly goes below half the raw size
    )


def _features(model: Published, denoiser: FrozenDenoiser) -> int:
    """Return the number of channels of the block that features are taken from."""
    block = denoiser.network.get_submodule(middle_block(denoiser.network))
    found = block_output(block, lambda: denoiser.predict(*given(model, denoiser)))
    output = found[-1] if isinstance(found, tuple) else found
    return output.shape[1] if output.dim() == 4 else output.shape[-1]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()
    print(
        f"{options.images} images, {options.prompts} prompts; hours on {options.devices} devices "
        f"at {UTILISATION:.0%} of a card's operations\n"
    )
    head = ("model", "1000 images", "adapter", "a prompt", "the run", *CARDS)
    sizes = (
        "model",
        "weights",
        "a pass of training",
        "disk, 1000 images",
        "disk, a prompt",
        "the run",
    )
    rows, memory = [], []
    for name, scale in SCALES.items():
        found = costs(MODELS[name], settings_of(scale))
        whole = found.fixed + options.images * found.an_image + options.prompts * found.a_prompt
        peta = (1000 * found.an_image, found.fixed, found.a_prompt, whole)
        hours = [whole / (3600 * UTILISATION * v * options.devices) for v in CARDS.values()]
        rows.append([name, *(f"{v / 1e15:,.0f}" for v in peta), *(f"{v:.1f}" for v in hours)])
        disk = options.images * found.disk_image + options.prompts * found.disk_prompt
        held = (found.weights, found.activations, 1000 * found.disk_image, found.disk_prompt, disk)
        memory.append([name, *(f"{v / 2**30:.1f}" for v in held)])
    for titles, lines, unit in ((head, rows, "PFLOP, and hours"), (sizes, memory, "GiB")):
        print(f"{unit}:\n\n| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
        print("\n".join(f"| {' | '.join(line)} |" for line in lines), end="\n\n")


if __name__ == "__main__":
    main()
