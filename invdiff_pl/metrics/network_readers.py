"""Readers of attributes that are models of transformers: CLIP, VQA models, image classifiers."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)

from invdiff_pl.metrics.clip import ClipEncoder
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_json


class NetworkReader:
    """Base class of these readers: a frozen network on a device, with named classes.

    Args:
        network: the network, in evaluation mode.
        name: name of the attribute.
        classes: names of the K classes, at least 2, all different.
        identity: JSON values that, beside its name and classes, tell it from other readers.

    Raises:
        InvDiffError: if there are fewer than two classes, or two have the same name.
    """

    def __init__(
        self, network: nn.Module, name: str, classes: Sequence[str], identity: object
    ) -> None:
        if len(classes) < 2 or len(set(classes)) < len(classes) or not all(classes):
            raise InvDiffError(
                f"{name}: expected two classes or more, all different, found "
                f"{', '.join(map(repr, classes)) or 'none'}."
            )
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.classes = tuple(classes)
        self.identity = digest_json([type(self).__name__, list(classes), identity])

    def to(self, device: torch.device | str) -> "NetworkReader":
        """Move the network to a device."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the class of each of B pictures, int64 ``[B]``, from uint8 ``[B, 3, H, W]``."""
        return self.scores(images.cpu()).argmax(1).cpu()

    @abstractmethod
    def scores(self, images: Tensor) -> Tensor:
        """Compute a score of each class, float ``[B, K]``."""


class ClipReader(NetworkReader):
    """CLIP as a reader, which chooses the phrase whose embedding is nearest to the picture's.

    Args:
        source: folder of a CLIP model with tokenizer and image processor, or hub id.
        phrases: K phrases, or phrases by name of the class; such as ``{"woman": "a photo of a
            woman", "man": "a photo of a man"}``.
        name: name of the attribute.

    Raises:
        InvDiffError: if there is no such model, or fewer than two phrases.
    """

    network: ClipEncoder

    def __init__(
        self, source: str, phrases: Mapping[str, str] | Sequence[str], name: str = "attribute"
    ) -> None:
        by_class = phrases if isinstance(phrases, Mapping) else {each: each for each in phrases}
        super().__init__(ClipEncoder(source), name, list(by_class), [source, *by_class.values()])
        self.embeddings = self.network.encode_prompts(list(by_class.values()))

    def scores(self, images: Tensor) -> Tensor:
        """Compute cosines with the phrases, ``[B, K]``."""
        found = self.network.encode_images(images)
        return found @ self.embeddings.T.to(found.device)


class ImageClassifierReader(NetworkReader):
    """An image classifier of transformers as a reader.

    Args:
        source: folder of the model with its image processor, or hub id.
        classes: the model's own labels by name of a class, such as ``{"young": ["0-2", "3-9"],
            "old": ["more than 70"]}``: probabilities are added up, and other labels ignored. Each
            of the model's labels is a class if not given.
        name: name of the attribute.

    Raises:
        InvDiffError: if there is no such model, or it has no such label.
    """

    def __init__(
        self,
        source: str,
        classes: Mapping[str, Sequence[str]] | None = None,
        name: str = "attribute",
    ) -> None:
        model = _load(AutoModelForImageClassification, source, "an image classifier")
        self.processor = _load_plain(AutoImageProcessor, source, "an image classifier")
        labels = {str(label): int(number) for number, label in model.config.id2label.items()}
        chosen = {label: [label] for label in labels} if classes is None else dict(classes)
        super().__init__(model, name, list(chosen), [source, chosen])
        self.columns = [
            [_place(labels, label, source) for label in group] for group in chosen.values()
        ]

    def scores(self, images: Tensor) -> Tensor:
        """Compute the probabilities of the classes, ``[B, K]``."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        logits = self.network(pixel_values=pixels.to(_device(self.network))).logits
        shares = logits.float().softmax(1)
        return torch.stack([shares[:, columns].sum(1) for columns in self.columns], dim=1)


class VqaReader(NetworkReader):
    """A model that answers questions about pictures, as a reader: the likeliest of given answers.

    It takes models that choose among known answers (ViLT), and models that write them (BLIP), of
    which the log-likelihoods of the answers are compared, one picture at a time.

    Args:
        source: folder of the model with its processor, or hub id.
        question: question such as ``"Is this a man or a woman?"``.
        answers: K answers, each a class; or answers by name of the class.
        name: name of the attribute.

    Raises:
        InvDiffError: if there is no such model, or it knows no such answer.
    """

    def __init__(
        self,
        source: str,
        question: str,
        answers: Mapping[str, str] | Sequence[str],
        name: str = "attribute",
    ) -> None:
        model = _load(AutoModelForVisualQuestionAnswering, source, "a VQA model")
        self.processor = _load_plain(AutoProcessor, source, "a VQA model")
        by_class = answers if isinstance(answers, Mapping) else {each: each for each in answers}
        self.question = question
        self.answers = list(by_class.values())
        super().__init__(model, name, list(by_class), [source, question, self.answers])
        self._writes = hasattr(model, "text_decoder")
        if not self._writes:
            labels = {str(label): int(number) for number, label in model.config.id2label.items()}
            self._columns = [_place(labels, answer, source) for answer in self.answers]

    def scores(self, images: Tensor) -> Tensor:
        """Compute logits or log-likelihoods of the answers, ``[B, K]``."""
        if self._writes:
            return torch.stack([self._likelihoods(image) for image in images])
        return self.network(**self._inputs(list(images))).logits[:, self._columns]

    def _likelihoods(self, image: Tensor) -> Tensor:
        inputs = self._inputs([image])
        found = []
        for answer in self.answers:
            tokens = self.processor.tokenizer(answer, return_tensors="pt").input_ids
            # The loss is a mean over the tokens that follow the first.
            loss = self.network(**inputs, labels=tokens.to(_device(self.network))).loss
            found.append(-loss * (tokens.shape[1] - 1))
        return torch.stack(found)

    def _inputs(self, images: list[Tensor]) -> Any:
        texts = [self.question] * len(images)
        made = self.processor(images=images, text=texts, return_tensors="pt", padding=True)
        return made.to(_device(self.network))


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _place(labels: Mapping[str, int], label: str, source: str) -> int:
    if label not in labels:
        some = ", ".join(list(labels)[:8]) + (", …" if len(labels) > 8 else "")
        raise InvDiffError(f"{source!r} cannot tell {label!r}: its labels are {some}.")
    return labels[label]


def _load(kind: Any, source: str, what: str) -> Any:
    # The other formats are pickles, which may run code.
    return _tried(lambda: kind.from_pretrained(source, use_safetensors=True), source, what)


def _load_plain(kind: Any, source: str, what: str) -> Any:
    return _tried(lambda: kind.from_pretrained(source), source, what)


def _tried(load: Callable[[], Any], source: str, what: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvDiffError(
            f"cannot load {source!r} as {what} ({reason}): give the folder of one."
        ) from None
