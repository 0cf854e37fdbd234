"""Readers of attributes: what tells the class of an attribute from a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from invdiff_pl.data.images import to_float
from invdiff_pl.metrics.classifier import SampleClassifier


class AttributeReader(Protocol):
    """Reads one attribute off pictures."""

    @property
    def name(self) -> str:
        """Of the attribute."""

    @property
    def classes(self) -> Sequence[str]:
        """Its K classes, in the order of their numbers."""

    def __call__(self, images: Tensor) -> Tensor:
        """The class of each of B pictures, int64 ``[B]``, of uint8 ``[B, 3, H, W]``."""


class FunctionReader:
    """A function as a reader.

    Args:
        function: from uint8 ``[B, 3, H, W]`` to class numbers ``[B]``.
        classes: K names.
        name: of the attribute.

    Example:
        >>> bright = FunctionReader(
        ...     lambda images: (images.float().mean((1, 2, 3)) > 127).long(), ["dark", "bright"]
        ... )
        >>> bright(torch.full((2, 3, 4, 4), 200, dtype=torch.uint8))
        tensor([1, 1])
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], classes: Sequence[str], name: str = "attribute"
    ) -> None:
        self.function = function
        self.classes = tuple(classes)
        self.name = name

    def __call__(self, images: Tensor) -> Tensor:
        """The class of each picture, int64 ``[B]``."""
        return self.function(images).long()


class ClassifierReader:
    """The classifier that ``invdiff train`` made of labelled images.

    Args:
        folder: of the classifier, such as ``runs/waterbirds/mini/classifier/classifier``.

    Raises:
        ValueError: if the folder holds none.
    """

    name = "attribute"

    def __init__(self, folder: str | Path) -> None:
        self.network, facts = SampleClassifier.load(Path(folder))
        self.classes: tuple[str, ...] = tuple(facts["attribute_names"])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The class of each picture, int64 ``[B]``."""
        return self.network(to_float(images))[0].argmax(1)
