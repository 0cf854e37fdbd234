"""The supported families: what each one's denoiser and pipeline are called with.

Read off the pipelines and training scripts of diffusers 0.42.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from invdiff_pl.backbones.check import FAMILIES as SUPPORTED
from invdiff_pl.backbones.denoiser import Condition, FrozenDenoiser
from invdiff_pl.backbones.draws import on_device
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
    """SDXL: a second text encoder's pooled embedding, and the size and crop of the image."""

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
    """Stable Diffusion 3 and 3.5: flow matching, pooled embeddings, shifted latents."""

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


class Flux(FrozenDenoiser):
    """FLUX.1: latents packed two by two, positions of tokens, and guidance as an input.

    A model that guidance was distilled into is given the pipeline's default.
    """

    pipelines = ("FluxPipeline",)
    architecture = "flux-1-dev"
    encoded = ("prompt_embeds", "pooled_prompt_embeds", "_text_ids")

    @property
    def own_resolution(self) -> int:
        """Side of the images that the pipeline draws, in pixels."""
        return int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of an image's latents, not packed."""
        side = 2 * (self.resolution // (2 * self.pipe.vae_scale_factor))
        return int(self.network.config.in_channels) // 4, side, side

    @property
    def tokens(self) -> int:
        """One for four pixels of the latents."""
        return self.latent_shape[1] * self.latent_shape[2] // 4

    def _encode_nothing(self) -> dict[str, Tensor]:
        return self._encode_prompts([""])

    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        height, width = noisy.shape[-2:]
        guidance = None
        if self.network.config.guidance_embeds:
            default = self.call_parameters["guidance_scale"].default
            guidance = torch.full((len(noisy),), default, device=noisy.device)
        sides = height // 2, width // 2
        positions = self.pipe._prepare_latent_image_ids(1, *sides, "cpu", noisy.dtype)
        predicted: Tensor = network(
            hidden_states=self._packed(noisy),
            timestep=time / 1000,
            guidance=guidance,
            pooled_projections=given["pooled_prompt_embeds"],
            encoder_hidden_states=given["prompt_embeds"],
            txt_ids=noisy.new_zeros((given["prompt_embeds"].shape[1], 3)),
            img_ids=on_device(positions, noisy.device),
            return_dict=False,
        )[0]
        return _unpacked(predicted, height, width)

    def _drawing(self, given: dict[str, Tensor]) -> dict[str, Any]:
        return {name: each for name, each in given.items() if not name.startswith("negative_")}

    def _packed(self, latents: Tensor) -> Tensor:
        packed: Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed

    def _unpacked(self, latents: Tensor) -> Tensor:
        return _unpacked(latents, *self.latent_shape[1:])


def _unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens ``[B, (h/2) (w/2), 4 C]`` as latents ``[B, C, h, w]``."""
    cells = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class _Masked(FrozenDenoiser):
    """One text encoder whose padding is masked; resolutions are taken as they are."""

    encoded = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    # Arguments of the network that it must be given, and does not look at.
    unused: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def _drawing(self, given: dict[str, Tensor]) -> dict[str, Any]:
        # Else the pipeline's default, an empty text, stands beside the embeddings.
        return {**given, "negative_prompt": None, "use_resolution_binning": False}

    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        predicted: Tensor = network(
            noisy,
            timestep=time * self.network.config.get("timestep_scale", 1),
            encoder_hidden_states=given["prompt_embeds"],
            encoder_attention_mask=given["prompt_attention_mask"],
            return_dict=False,
            **self.unused,
        )[0]
        return predicted[:, : noisy.shape[1]]  # some predict a variance after it


class PixArtSigma(_Masked):
    """PixArt-Σ, whose network predicts a variance beside the noise."""

    pipelines = ("PixArtSigmaPipeline",)
    architecture = "pixart-sigma"
    unused = MappingProxyType({"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}})


class Sana(_Masked):
    """Sana: an autoencoder without a posterior, flow matching."""

    pipelines = ("SanaPipeline",)
    architecture = "sana"


FAMILIES: tuple[type[FrozenDenoiser], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    PixArtSigma,
    Sana,
)


def frozen_denoiser(pipe: Any, resolution: int | None = None) -> FrozenDenoiser:
    """The interface to a loaded pipeline's denoiser.

    Args:
        pipe: a loaded pipeline of diffusers, of a supported family.
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
