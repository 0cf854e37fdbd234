"""Families with one text encoder whose padding is masked."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from invdiff_pl.backbones.denoiser import Condition, FrozenDenoiser


class Masked(FrozenDenoiser):
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


class PixArtSigma(Masked):
    """PixArt-Σ, whose network predicts a variance beside the noise."""

    pipelines = ("PixArtSigmaPipeline",)
    architecture = "pixart-sigma"
    unused = MappingProxyType({"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}})


class Sana(Masked):
    """Sana: an autoencoder without a posterior, flow matching."""

    pipelines = ("SanaPipeline",)
    architecture = "sana"
