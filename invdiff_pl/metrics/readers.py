"""Readers of attributes, which classify pictures by an attribute."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from invdiff_pl.data.images import to_float
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.metrics.scorers import encoder_identity
from invdiff_pl.utils.errors import InvDiffError

_BATCH = 64


class AttributeReader(Protocol):
    """A classifier of pictures by one attribute.

    It may have two more members: ``confusion``, int64 ``[K, K]``, pictures by true class (rows) and
    class as read, with which counts are corrected for its errors; and ``identity``, a text that
    changes whenever it would read differently.
    """

    @property
    def name(self) -> str:
        """Name of the attribute."""

    @property
    def classes(self) -> Sequence[str]:
        """Its K classes, in the order of their numbers."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the class of each of B pictures, int64 ``[B]``, from uint8 ``[B, 3, H, W]``."""


class FunctionReader:
    """Wraps a function as a reader.

    Args:
        function: function from uint8 ``[B, 3, H, W]`` to class numbers ``[B]``.
        classes: names of the K classes.
        name: name of the attribute.

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
    """A classifier that ``invdiff train`` trained on labelled images, with its held-out errors.

    Args:
        folder: folder of the classifier, such as ``runs/waterbirds/mini/classifier/classifier``.
        name: name of the attribute.

    Raises:
        ValueError: if the folder holds no classifier.
    """

    def __init__(self, folder: str | Path, name: str = "attribute") -> None:
        self.network, facts = SampleClassifier.load(Path(folder))
        self.name = name
        self.classes: tuple[str, ...] = tuple(facts["attribute_names"])
        held_out = facts.get("held_out_confusion")
        self.confusion = None if held_out is None else torch.tensor(held_out["attribute"])
        self.identity = encoder_identity("classifier", self.network, None)["weights"]

    def to(self, device: torch.device | str) -> "ClassifierReader":
        """Move the network to a device."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The class of each picture, int64 ``[B]``."""
        device = self.network.attribute_head.weight.device
        return self.network(to_float(images.to(device)))[0].argmax(1)


class CheckedReader:
    """A reader whose errors are measured on labelled pictures, so that counts can be corrected.

    See :func:`~invdiff_pl.metrics.correct_for_classifier`.

    Args:
        reader: any reader.
        images: N labelled pictures, uint8 ``[N, 3, H, W]``, or batches of them.
        labels: class of each picture, int64 ``[N]``, in [0, K); every class must occur.

    Attributes:
        confusion: int64 ``[K, K]``, pictures by true class (rows) and class as read.

    Raises:
        InvDiffError: if the labels do not match the pictures, or a class is missing.

    Example:
        >>> bright = FunctionReader(
        ...     lambda images: (images.float().mean((1, 2, 3)) > 127).long(), ["dark", "bright"]
        ... )
        >>> pictures = torch.tensor([0, 0, 255, 0]).byte()[:, None, None, None].expand(4, 3, 2, 2)
        >>> CheckedReader(bright, pictures, torch.tensor([0, 0, 1, 1])).confusion.tolist()
        [[2, 0], [1, 1]]
    """

    def __init__(
        self, reader: AttributeReader, images: Tensor | Iterable[Tensor], labels: Tensor
    ) -> None:
        self.reader = reader
        self.name, self.classes = reader.name, tuple(reader.classes)
        self.identity = getattr(reader, "identity", None)
        batches = images.split(_BATCH) if isinstance(images, Tensor) else images
        read = torch.cat([reader(batch).cpu() for batch in batches])
        classes = len(self.classes)
        if len(read) != len(labels) or bool(((labels < 0) | (labels >= classes)).any()):
            raise InvDiffError(
                f"labels: expected one of 0 to {classes - 1} for each of {len(read)} pictures, "
                f"found {len(labels)} from {int(labels.min())} to {int(labels.max())}."
            )
        cells = labels.cpu() * classes + read
        self.confusion = cells.bincount(minlength=classes**2).view(classes, classes)
        absent = (self.confusion.sum(1) == 0).nonzero().squeeze(1).tolist()
        if absent:
            raise InvDiffError(
                f"labels: there is no picture of {self.classes[absent[0]]!r}, so errors on "
                "it cannot be estimated; give some of every class."
            )

    def __call__(self, images: Tensor) -> Tensor:
        """The class of each picture, int64 ``[B]``."""
        return self.reader(images)
