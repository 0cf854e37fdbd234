"""Settings of the scoring of samples; the YAML files under ``experiments/`` fill them in."""

from dataclasses import dataclass


@dataclass
class EvaluationSettings:
    """Settings of the scoring of samples.

    Attributes:
        extractor: extractor of features for the Fréchet distance, precision and recall, see
            ``invdiff_pl.metrics.extractors``.
        weights: file of the extractor's weights, if it needs one.
        resolution: side in pixels that images are resized to for the extractor; its own if
            ``None``.
        neighbours: number of neighbours for precision, recall, density and coverage.
        inception: file of InceptionV3's weights for FID, which is left out if not given.
        dinov2: folder of a DINOv2 model for a Fréchet distance on its features.
        clip: folder or hub id of a CLIP model for CLIP-T and CMMD, which are left out if not given.
        second_classifier: folder of a classifier of another attribute, for the bias over both.
        target: shares that the attribute's classes should have, for total variation and KL; even
            ones if not given.
    """

    extractor: str = "efficientnet_lite0"
    weights: str | None = None
    resolution: int | None = None
    neighbours: int = 3
    inception: str | None = None
    dinov2: str | None = None
    clip: str | None = None
    second_classifier: str | None = None
    target: list[float] | None = None
