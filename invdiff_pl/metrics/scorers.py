"""The networks that score samples, and which figures are left out if networks are missing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.metrics.clip import ClipEncoder
from invdiff_pl.metrics.extractors import FeatureExtractor, MissingWeightsError, build_extractor
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_bytes

MAIN = "frechet_distance"
FID = "fid"
DINOV2 = "fd_dinov2"
CLIP_T = "clip_t"
CMMD = "cmmd"
_TITLES = {
    MAIN: "Fréchet distance, precision and recall are",
    FID: "FID is",
    DINOV2: "the Fréchet distance on DINOv2 features is",
    CLIP_T: "CLIP-T (and CMMD) is",
}


@dataclass
class Scorers:
    """The frozen networks that score samples, on one device.

    Attributes:
        classifier: classifier of an image's attribute and prompt.
        facts: content of its ``classifier.json``.
        second: classifier of another attribute, if given.
        second_facts: content of the second one's ``classifier.json``.
        extractors: extractors of features for Fréchet distances, by figure; the main one also
            serves precision and recall.
        clip: encoder for CLIP-T and CMMD.
        left_out: reasons by figure for those that are not measured.
    """

    classifier: SampleClassifier
    facts: dict[str, Any]
    second: SampleClassifier | None = None
    second_facts: dict[str, Any] = field(default_factory=dict)
    extractors: dict[str, FeatureExtractor] = field(default_factory=dict)
    clip: ClipEncoder | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls, settings: EvaluationSettings, classifier: Path, data: BiasedDataModule, *, few: bool
    ) -> "Scorers":
        """Load the networks that the settings name; missing ones are left out with the reason.

        Args:
            settings: settings of the evaluation.
            classifier: folder of the trained classifier.
            data: DataModule whose prompts the classifier must know.
            few: load only the classifier and the main extractor, for a quick look in training.

        Raises:
            InvDiffError: if there is no classifier of these prompts, or a setting is wrong.
        """
        network, facts = _load_classifier(classifier, data)
        found = cls(network, facts)
        resolution = settings.resolution
        found._try(
            MAIN,
            "weights",
            lambda: build_extractor(settings.extractor, _path(settings.weights), resolution),
        )
        if few:
            return found
        if settings.second_classifier is not None:
            second = Path(settings.second_classifier)
            found.second, found.second_facts = _load_classifier(second, data)
        found._try(
            FID, "inception", lambda: build_extractor("inception_v3", _path(settings.inception))
        )
        found._try(DINOV2, "dinov2", lambda: build_extractor("dinov2", _path(settings.dinov2)))
        found._load_clip(settings.clip)
        return found

    def _try(self, figure: str, setting: str, build: Callable[[], FeatureExtractor]) -> None:
        try:
            self.extractors[figure] = build()
        except MissingWeightsError as error:
            self.left_out[figure] = f"{error}; name it with evaluation.{setting}="

    def _load_clip(self, source: str | None) -> None:
        reason = "no CLIP model is given; name the folder of one with evaluation.clip="
        if source is not None:
            try:
                self.clip = ClipEncoder(source)
                return
            except InvDiffError as error:
                reason = f"{error}; name it with evaluation.clip="
        self.left_out[CLIP_T] = self.left_out[CMMD] = reason

    def to(self, device: torch.device) -> "Scorers":
        """Move every network."""
        for network in (self.classifier, self.second, *self.extractors.values()):
            if network is not None:
                network.to(device)
        if self.clip is not None:
            self.clip.to(device)
        return self

    def notices(self, asked: EvaluationSettings) -> list[str]:
        """Return a line for each figure that is left out; DINOv2 only if it was asked for."""
        quiet = {CMMD} | ({DINOV2} if asked.dinov2 is None else set())
        return [
            f"{_TITLES[figure]} left out: {reason}"
            for figure, reason in self.left_out.items()
            if figure not in quiet
        ]


def encoder_identity(name: str, network: nn.Module, input_size: int | None) -> dict[str, Any]:
    """Return what tells an encoder from others: name, input size and a digest of its weights."""
    parts = [
        part
        for key, value in sorted(network.state_dict().items())
        for part in (key.encode(), _bytes(value))
    ]
    return {"name": name, "input_size": input_size, "weights": digest_bytes(*parts)}


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _load_classifier(
    folder: Path, data: BiasedDataModule
) -> tuple[SampleClassifier, dict[str, Any]]:
    network, facts = SampleClassifier.load(folder)
    if facts["prompts"] != list(data.prompts):
        raise InvDiffError(
            f"{folder} was trained for other prompts than those of {data.root}: rerun the "
            "classifier stage."
        )
    return network, facts
