"""FLUX, whose denoisers take latents packed two by two, and token positions."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from invdiff_pl.backbones.denoiser import Condition, FrozenDenoiser
from invdiff_pl.backbones.draws import on_device
from invdiff_pl.backbones.latents import scaled_latents
from invdiff_pl.backbones.noising import NoiseProcess, noise_process


class Flux(FrozenDenoiser):
    """FLUX.1, which takes latents packed two by two, token positions, and guidance as an input.

    A guidance-distilled model is given the pipeline's default guidance scale.
    """

    pipelines = ("FluxPipeline",)
    architecture = "flux-1-dev"
    encoded: ClassVar[tuple[str, ...]] = (
        "prompt_embeds",
        "pooled_prompt_embeds",
        "_text_ids",
    )
    token_side = 2

    @property
    def own_resolution(self) -> int:
        """Side in pixels of the images that the pipeline draws by default."""
        return int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of an image's latents before packing."""
        side = 2 * (self.resolution // (2 * self.pipe.vae_scale_factor))
        return int(self.network.config.in_channels) // 4, side, side

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


class Flux2(Flux):
    """FLUX.2 [klein], with no pooled embedding and packed latents normalised by channel.

    Latents are unpacked ones here, as for FLUX.1. The shift of its schedule depends on the number
    of sampling steps, for which the pipeline's default is taken.
    """

    pipelines = ("Flux2KleinPipeline",)
    architecture = "flux-2-klein"
    encoded = ("prompt_embeds", "_text_ids")

    @cached_property
    def process(self) -> NoiseProcess:
        """Flow matching at the shift that the pipeline samples with."""
        steps = self.call_parameters["num_inference_steps"].default
        shift = compute_empirical_mu(self.tokens, steps)
        return noise_process(self.pipe.scheduler.config, self.tokens, shift)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalise latents by the statistics that the autoencoder keeps of packed latents."""
        return self._normalised(scaled_latents({"scaling_factor": 1.0}, moments, noise))

    def _normalised(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents.device)
        return _unpacked((_packed(latents) - mean) / deviation, *latents.shape[-2:])

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents.device)
        return _unpacked(_packed(latents) * deviation + mean, *latents.shape[-2:])

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of each channel of packed latents."""
        vae = self.pipe.vae
        mean, variance = (value.float() for value in (vae.bn.running_mean, vae.bn.running_var))
        deviation = (variance + vae.config.batch_norm_eps).sqrt()
        return mean.to(device), deviation.to(device)

    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        height, width = noisy.shape[-2:]
        texts = given["prompt_embeds"]
        text_positions = self.pipe._prepare_text_ids(torch.empty(1, texts.shape[1], 0))
        positions = self.pipe._prepare_latent_ids(torch.empty(1, 0, height // 2, width // 2))
        predicted: Tensor = network(
            hidden_states=_packed(noisy),
            timestep=time / 1000,
            guidance=None,
            encoder_hidden_states=texts,
            txt_ids=on_device(text_positions, noisy.device),
            img_ids=on_device(positions, noisy.device),
            return_dict=False,
        )[0]
        return _unpacked(predicted, height, width)

    def _drawing(self, given: dict[str, Tensor]) -> dict[str, Any]:
        return given

    def _packed(self, latents: Tensor) -> Tensor:
        tokens = _packed(latents)
        height, width = latents.shape[-2:]
        return tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))

    def _unpacked(self, latents: Tensor) -> Tensor:
        return self._normalised(latents.float())


def _packed(latents: Tensor) -> Tensor:
    """Pack latents ``[B, C, h, w]`` into tokens ``[B, (h/2) (w/2), 4 C]``."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def _unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens ``[B, (h/2) (w/2), 4 C]`` into latents ``[B, C, h, w]``."""
    cells = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
