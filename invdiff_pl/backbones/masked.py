"""Families with one text encoder whose padding is masked."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from invdiff_pl.backbones.denoiser import Condition, FrozenDenoiser


class Masked(FrozenDenoiser):
    """Base class of families with one text encoder whose padding is masked.

    The resolution is used as given, not rounded to one of the pipeline's own.
    """

    encoded = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    # Arguments that the network requires but does not use.
    unused: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def _drawing(self, given: dict[str, Tensor]) -> dict[str, Any]:
        # Some pipelines' default, an empty text, must not be passed beside the embeddings.
        chosen = {**given, "negative_prompt": None, "use_resolution_binning": False}
        return {name: value for name, value in chosen.items() if name in self.call_parameters}

    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        predicted: Tensor = network(
            noisy,
            timestep=time * self.network.config.get("timestep_scale", 1),
            encoder_hidden_states=given["prompt_embeds"],
            encoder_attention_mask=given["prompt_attention_mask"],
            return_dict=False,
            **self.unused,
        )[0]
        return predicted[:, : noisy.shape[1]]  # a variance may follow


class PixArtSigma(Masked):
    """PixArt-Σ, whose network predicts a variance besides the noise."""

    pipelines = ("PixArtSigmaPipeline",)
    architecture = "pixart-sigma"
    unused = MappingProxyType({"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}})


class Sana(Masked):
    """Sana, with flow matching and an autoencoder without a posterior."""

    pipelines = ("SanaPipeline",)
    architecture = "sana"


class Lumina2(Masked):
    """Lumina 2, whose time runs from noise to images, as does its velocity.

    Text and image are one sequence.
    """

    pipelines = ("Lumina2Pipeline",)
    architecture = "lumina-2"

    def image_tokens(self, output: Any) -> Any:
        """Return the last tokens of a sequence, which are the image's."""
        return output[:, -self.tokens :]

    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        return -super()._call(network, noisy, 1 - time / 1000, given)


class ZImage(Masked):
    """Z-Image, with Lumina 2's time and velocity, and lists of images and of unpadded texts.

    In conditions, texts are padded and masked as in the other families.
    """

    pipelines = ("ZImagePipeline",)
    architecture = "z-image"
    token_side = 2

    @property
    def own_resolution(self) -> int:
        """Side in pixels of the images that the pipeline draws by default."""
        return 1024

    def image_tokens(self, output: Any) -> Any:
        """Return the first tokens of a sequence, which are the image's."""
        return output[:, : self.tokens]

    def _encode(self, prompts: list[str]) -> Sequence[Tensor]:
        longest = self.call_parameters["max_sequence_length"].default
        rows = (_padded(list(texts), longest) for texts in super()._encode(prompts))
        return [part for embedding in rows for part in embedding]

    def _call(self, network: nn.Module, noisy: Tensor, time: Tensor, given: Condition) -> Tensor:
        texts = _texts(given["prompt_embeds"], given["prompt_attention_mask"])
        images = list(noisy.unsqueeze(2).unbind())
        predicted = network(images, 1 - time / 1000, texts, return_dict=False)[0]
        return -torch.stack(predicted).squeeze(2)

    def _drawing(self, given: dict[str, Tensor]) -> dict[str, Any]:
        return {
            f"{sign}prompt_embeds": _texts(
                given[f"{sign}prompt_embeds"], given[f"{sign}prompt_attention_mask"]
            )
            for sign in ("", "negative_")
        }

    def _guidance(self, scale: float) -> dict[str, float]:
        # This pipeline's scale is a weight on top of the prediction: 0 means no guidance.
        return {"guidance_scale": scale - 1}


def _padded(texts: Sequence[Tensor], longest: int) -> tuple[Tensor, Tensor]:
    """Pad P texts ``[L_i, D]`` to ``[P, longest, D]``, and return their mask, too."""
    lengths = torch.tensor([len(text) for text in texts])
    rows = [nn.functional.pad(text, (0, 0, 0, longest - len(text))) for text in texts]
    mask = torch.arange(longest) < lengths[:, None]
    return torch.stack(rows), mask.long().to(rows[0].device)


def _texts(rows: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the texts without their padding."""
    lengths = mask.sum(1).tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]
