"""Words that tell a candidate's groups apart, from a model that embeds pictures and words."""

import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from invdiff_pl.environments.space import prompt_means

# Words that are tried if neither a list nor captions are given.
WORDS = (
    *("woman", "man", "girl", "boy", "young person", "old person", "child", "baby", "crowd"),
    *("black skin", "white skin", "long hair", "short hair", "blond hair", "black hair", "beard"),
    *("glasses", "hat", "uniform", "suit", "dress", "smile", "indoors", "outdoors", "street"),
    *("city", "office", "hospital", "kitchen", "room", "building", "road", "car", "sky", "water"),
    *("sea", "lake", "beach", "forest", "grass", "tree", "flower", "mountain", "snow", "desert"),
    *("field", "night", "day", "sunset", "rain", "dark", "bright", "red", "green", "blue"),
    *("yellow", "white", "black", "brown", "grey", "colourful", "black and white", "blurred"),
    *("drawing", "photograph", "text", "animal", "dog", "cat", "bird", "food", "sport", "vehicle"),
)
# Maximum numbers of images looked at, and of words per name.
MOST_IMAGES = 1000
NAMED_BY = 3


class Encoder(Protocol):
    """A model such as :class:`invdiff_pl.metrics.clip.ClipEncoder`."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings of texts, of unit length, ``[W, D]``."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Return embeddings of images uint8 ``[B, 3, H, H]``, of unit length, ``[B, D]``."""


def words_of(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the words of three letters or more that occur in captions, sorted."""
    return tuple(sorted({word for text in texts for word in re.findall(r"[^\W\d_]{3,}", text)}))


def group_words(
    images: Tensor, memberships: Tensor, prompts: Tensor, words: Sequence[str], texts: Tensor
) -> list[str]:
    """Find the words that tell each group from the others.

    What a prompt names shifts all its images alike and is removed; a group is named by the words
    that lie nearest to what is left of its images' embeddings.

    Args:
        images: embeddings of the images, ``[N, D]``.
        memberships: memberships in G groups, ``[N, G]``.
        prompts: int64 ``[N]``.
        words: W words.
        texts: embeddings of the words, ``[W, D]``.

    Returns:
        G texts of up to three words, separated by commas.

    Example:
        >>> groups = torch.eye(2).repeat(4, 1)  # images along the one axis or along the other
        >>> group_words(groups, groups, torch.zeros(8).long(), ["wet", "dry"], torch.eye(2))
        ['wet', 'dry']
    """
    residuals = images.double() - prompt_means(images.double(), prompts)[prompts]
    weights = memberships.double()
    means = weights.T @ residuals / weights.sum(0).clamp(min=1e-9)[:, None]
    words_alone = texts.double() - texts.double().mean(0)
    likeness = torch.nn.functional.normalize(means - means.mean(0), dim=1) @ words_alone.T
    # Only words on a group's own side tell it from the others.
    return [
        ", ".join(words[n] for n in row.argsort(descending=True)[:NAMED_BY].tolist() if row[n] > 0)
        for row in likeness
    ]
