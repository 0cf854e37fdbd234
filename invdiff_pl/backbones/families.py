"""The supported families: the arguments that each one's denoiser and pipeline take.

They follow the pipelines and training scripts of diffusers 0.42.
"""

from typing import Any

import torch
from torch import Tensor, nn

from invdiff_pl.backbones.check import FAMILIES as SUPPORTED
from invdiff_pl.backbones.denoiser import Condition, FrozenDenoiser
from invdiff_pl.backbones.draws import on_device
from invdiff_pl.backbones.flux import Flux, Flux2
from invdiff_pl.backbones.masked import Lumina2, PixArtSigma, Sana, ZImage
from invdiff_pl.backbones.noising import predict
from invdiff_pl.utils.errors import InvDiffError


class StableDiffusion(FrozenDenoiser):
    """Stable Diffusion 1.x and 2.x."""

    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    architecture = "stable-diffusion-v1"
    encoded = ("prompt_embeds", "negative_prompt_embeds")

    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        return predict(network, noisy, time, given["prompt_embeds"])


class StableDiffusionXL(FrozenDenoiser):
    """SDXL, which also takes a second text encoder's pooled embedding and image size and crop."""

    pipelines = ("StableDiffusionXLPipeline",)
    architecture = "stable-diffusion-xl-v1-base"
    encoded = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )

    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        pooled = given["pooled_prompt_embeds"]
        size = [side * self.pipe.vae_scale_factor for side in noisy.shape[-2:]]
        sizes = torch.tensor([*size, 0, 0, *size]).to(pooled.dtype)  # original, corner, target
        known = on_device(sizes, noisy.device).expand(len(noisy), -1)
        added = {"text_embeds": pooled, "time_ids": known}
        prediction: Tensor = network(
            noisy, time, given["prompt_embeds"], added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction


class StableDiffusion3(FrozenDenoiser):
    """Stable Diffusion 3 and 3.5, with flow matching, pooled embeddings and shifted latents."""

    pipelines = ("StableDiffusion3Pipeline",)
    architecture = "stable-diffusion-3"
    encoded = StableDiffusionXL.encoded

    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        prediction: Tensor = network(
            hidden_states=noisy,
            timestep=time,
            encoder_hidden_states=given["prompt_embeds"],
            pooled_projections=given["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return prediction


FAMILIES: tuple[type[FrozenDenoiser], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    Flux2,
    PixArtSigma,
    Sana,
    Lumina2,
    ZImage,
)


def frozen_denoiser(pipe: Any, resolution: int | None = None) -> FrozenDenoiser:
    """Return the interface to a loaded pipeline's denoiser.

    Args:
        pipe: a loaded diffusers pipeline of a supported family.
        resolution: side of the images in pixels; the pipeline's own if not given.

    Raises:
        InvDiffError: if its family is not supported.

    Example:
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> denoiser = frozen_denoiser(tiny_pipeline(["a photo of a nurse"]))
        >>> noise, _ = denoiser.initial_noise([0, 1], seed=0)
        >>> given = denoiser.condition(["a photo of a nurse", ""])
        >>> denoiser.predict(noise, torch.tensor([300, 300]), given).shape
        torch.Size([2, 4, 16, 16])
    """
    names = [each.__name__ for each in type(pipe).__mro__]
    for kind in FAMILIES:
        if any(name in kind.pipelines for name in names):
            return kind(pipe, resolution)
    raise InvDiffError(
        f"pipe: a {names[0]} is not supported; expected one of {', '.join(SUPPORTED)}."
    )
