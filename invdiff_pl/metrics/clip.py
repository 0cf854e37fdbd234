"""CLIP-T: how well images match their prompts, by a CLIP model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from invdiff_pl.utils.errors import InvDiffError


class ClipEncoder(nn.Module):
    """A frozen CLIP model with its tokenizer and image processor; calling it encodes images.

    Args:
        source: folder of a model as saved by transformers, or a hub id.

    Raises:
        InvDiffError: if there is no such model on disk and it cannot be downloaded.
    """

    name = "clip"

    def __init__(self, source: str) -> None:
        super().__init__()
        try:
            model = CLIPModel.from_pretrained(source, use_safetensors=True)  # no pickles
            self.model = model.eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.processor = CLIPImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InvDiffError(
                f"cannot load the CLIP model {source!r} ({reason}): give the folder of one"
            ) from None

    @property
    def num_features(self) -> int:
        """Length of an embedding."""
        return int(self.model.config.projection_dim)

    @property
    def input_size(self) -> int:
        """Side in pixels that images are scaled and cropped to."""
        return int(self.model.config.vision_config.image_size)

    def train(self, mode: bool = True) -> "ClipEncoder":
        """Stay in evaluation mode, whatever the enclosing module does."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images, see :meth:`encode_images`."""
        return self.encode_images(images)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return the prompts' text embeddings of unit length, ``[P, D]``."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return torch.nn.functional.normalize(self.model.text_projection(pooled), dim=-1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return embeddings of unit length, ``[N, D]``, of uint8 images ``[N, 3, H, W]``."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        pooled = self.model.vision_model(pixels.to(self.model.device)).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(pooled), dim=-1)


class ClipScore(Metric):
    """CLIP-T: 100 times the mean cosine between an image and its prompt.

    The encoder is kept out of the module tree, so that no checkpoint holds it; prompts are encoded
    once. Sums are float64, and are added over ranks.

    Args:
        encoder: encoder of images and prompts.
        prompts: the distinct prompts, at least one.
        kwargs: further arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    encoder: ClipEncoder
    total: Tensor
    count: Tensor

    def __init__(self, encoder: ClipEncoder, prompts: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        object.__setattr__(self, "encoder", encoder)  # not a submodule
        self.embeddings = encoder.encode_prompts(prompts).double()
        zeros = torch.zeros(len(prompts), dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", zeros.clone(), dist_reduce_fx="sum")

    def update(self, prompts: Tensor, images: Tensor) -> None:
        """Add images.

        Args:
            prompts: number of each image's prompt, int64 ``[N]``.
            images: uint8 ``[N, 3, H, W]``.
        """
        self.update_embeddings(prompts, self.encoder.encode_images(images))

    def update_embeddings(self, prompts: Tensor, embeddings: Tensor) -> None:
        """Add images by their embeddings of unit length ``[N, D]``; else like :meth:`update`."""
        found = embeddings.double().to(self.device)
        cosines = (found * self.embeddings.to(self.device)[prompts]).sum(1)
        self.total.index_add_(0, prompts, cosines)
        self.count.index_add_(0, prompts, torch.ones_like(cosines))

    def compute(self) -> dict[str, Tensor]:
        """Compute ``mean`` over images and ``per_prompt`` ``[P]`` (NaN without images), in percent.

        Raises:
            InvDiffError: if no image was added.
        """
        if not self.count.any():
            raise InvDiffError("CLIP-T needs at least one image, found none.")
        return {
            "mean": 100 * self.total.sum() / self.count.sum(),
            "per_prompt": 100 * self.total / self.count,
        }
