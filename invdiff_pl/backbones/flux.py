"""FLUX: latents packed two by two, and positions of tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from invdiff_pl.backbones.denoiser import Condition, FrozenDenoiser
from invdiff_pl.backbones.draws import on_device


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
