"""Figures of samples while they are drawn: bias, prompt accuracy, Fréchet distance, recall."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.data.images import to_float
from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import write_json
from invdiff_pl.metrics import (
    BiasScore,
    FrechetDistance,
    ManifoldScores,
    build_extractor,
    wilson_interval,
)
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.metrics.clip import ClipEncoder, ClipScore
from invdiff_pl.modules.conditional_sampler import ConditionalSampler, SampledBatch

_BATCH = 128


class SampleEvaluation(pl.Callback):
    """Scores what a :class:`ConditionalSampler` draws, on every rank, and writes ``metrics.json``.

    Ranks add up their sums and gather their features, so the figures do not depend on their
    number. Fréchet distance, precision and recall are to a *balanced* reference: equally many test
    images of each (prompt, attribute) cell. Without attribute labels every figure is ``null``, and
    the reason is given.

    Args:
        output: folder of ``metrics.json``.
        classifier: folder of a trained classifier.
        extractor: features of Fréchet distance, precision and recall, see
            ``invdiff_pl.metrics.extractors``.
        extractor_weights: file of the extractor's weights, where it needs one.
        extractor_resolution: images are resized to this side first; the extractor's own if not
            given.
        clip: folder or hub id of a CLIP model; CLIP-T is left out if it is not given or not there.
        neighbours: of precision, recall, density and coverage.
    """

    def __init__(
        self,
        output: str,
        classifier: str,
        extractor: str = "efficientnet_lite0",
        extractor_weights: str | None = None,
        extractor_resolution: int | None = None,
        clip: str | None = None,
        neighbours: int = 3,
    ) -> None:
        self.output = Path(output)
        self.classifier_folder = Path(classifier)
        weights = None if extractor_weights is None else Path(extractor_weights)
        self.extractor = build_extractor(extractor, weights, extractor_resolution)
        self.neighbours = neighbours
        self.clip, self.no_clip = _load_clip(clip)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the classifier, make a set of metrics a scale, and take in the reference."""
        assert isinstance(pl_module, ConditionalSampler)
        data: BiasedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.scored = data.attributes() is not None
        if not self.scored:
            return
        network, facts = SampleClassifier.load(self.classifier_folder)
        if facts["prompts"] != list(data.prompts):
            raise InvDiffError(
                f"{self.classifier_folder} was trained for other prompts than those of "
                f"{data.root}: rerun the classifier stage."
            )
        self.facts = facts
        self.classifier = network.to(pl_module.device)
        self.extractor.to(pl_module.device)
        sizes = (len(data.prompts), len(data.attribute_names))
        self.bias = {s: BiasScore(*sizes).to(pl_module.device) for s in pl_module.scales}
        self.right = {
            s: torch.zeros((len(data.prompts), 2), dtype=torch.int64, device=pl_module.device)
            for s in pl_module.scales
        }
        self.distance = {
            s: FrechetDistance(self.extractor).to(pl_module.device) for s in pl_module.scales
        }
        self.manifold = {
            s: ManifoldScores(self.extractor.num_features, self.neighbours).to(pl_module.device)
            for s in pl_module.scales
        }
        if self.clip is None:
            if trainer.is_global_zero:
                print(f"CLIP-T is left out: {self.no_clip}")
        else:
            encoder = self.clip.to(pl_module.device)
            self.clip_scores = {
                s: ClipScore(encoder, data.prompts).to(pl_module.device) for s in pl_module.scales
            }
        self._take_in_reference(trainer, data, pl_module.device)

    def _take_in_reference(
        self, trainer: pl.Trainer, data: BiasedDataModule, device: torch.device
    ) -> None:
        prompts, attributes = data.labels("test")
        assert attributes is not None
        rows = balanced_rows(prompts, attributes)
        self.reference_size = len(rows)
        images = data.images("test")
        for chunk in rows[trainer.global_rank :: trainer.world_size].split(_BATCH):
            features = self.extractor(images.gather(chunk).to(device))
            for scale in self.distance:
                self.distance[scale].update_features(features, real=True)
                self.manifold[scale].update(features, real=True)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: SampledBatch,
        *unused: Any,
    ) -> None:
        """Count the attributes and right prompts of a batch, add up its features."""
        if not self.scored or len(outputs["prompt"]) == 0:
            return
        prompts = outputs["prompt"].to(pl_module.device)
        for scale, pixels in outputs["images"].items():
            images = pixels.to(pl_module.device)
            attribute_logits, prompt_logits = self.classifier(to_float(images))
            self.bias[scale].update(prompts, attribute_logits.argmax(1))
            right = prompt_logits.argmax(1) == prompts
            count = torch.bincount(prompts * 2 + right, minlength=2 * len(self.right[scale]))
            self.right[scale] += count.reshape(-1, 2)
            features = self.extractor(images)
            self.distance[scale].update_features(features, real=False)
            self.manifold[scale].update(features, real=False)
            if self.clip is not None:
                self.clip_scores[scale].update(prompts, images)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute every figure and write them."""
        data: BiasedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if not self.scored:
            if trainer.is_global_zero:
                write_json(self.output / "metrics.json", unscored(data))
            return
        figures = {
            str(scale): {
                "bias": bias_figures(self.bias[scale], data.prompts, data.attribute_names),
                "prompt_accuracy": self._prompt_accuracy(trainer, scale, data.prompts),
                "frechet_distance": float(self.distance[scale].compute()),
                "manifold": _manifold_figures(self.manifold[scale]),
                "clip_t": self._clip_figures(scale, data.prompts),
            }
            for scale in self.bias
        }
        if not trainer.is_global_zero:
            return
        own = BiasScore(len(data.prompts), len(data.attribute_names))
        prompts, attributes = data.labels("train")
        assert attributes is not None
        own.update(prompts, attributes)
        report = {
            "scales": figures,
            "data": {"bias": bias_figures(own, data.prompts, data.attribute_names)},
            "samples_per_prompt": data.samples_per_prompt,
            "classifier": self.facts["held_out_accuracy"],
            "frechet_distance": {
                "backend": "torchmetrics",
                "extractor": self.extractor.name,
                "resize": self.extractor.input_size,
                "reference": "test split, equally many images of each (prompt, attribute)",
                "reference_images": self.reference_size,
                "n": data.samples_per_prompt * len(data.prompts),
            },
            "manifold": {"neighbours": self.neighbours},
        }
        write_json(self.output / "metrics.json", report)

    def _clip_figures(self, scale: float, prompts: tuple[str, ...]) -> dict[str, Any]:
        if self.clip is None:
            return {"reason": self.no_clip}
        found = self.clip_scores[scale].compute()
        return {
            "mean": float(found["mean"]),
            "per_prompt": dict(zip(prompts, found["per_prompt"].tolist(), strict=True)),
        }

    def _prompt_accuracy(
        self, trainer: pl.Trainer, scale: float, prompts: tuple[str, ...]
    ) -> dict[str, Any]:
        counts = trainer.strategy.reduce(self.right[scale], reduce_op="sum").cpu()
        right, seen = int(counts[:, 1].sum()), int(counts.sum())
        low, high = wilson_interval(torch.tensor(right), torch.tensor(seen)).tolist()
        shares = counts[:, 1] / counts.sum(1)
        return {
            "mean": right / seen,
            "interval": [low, high],
            "per_prompt": dict(zip(prompts, shares.tolist(), strict=True)),
        }


def _load_clip(source: str | None) -> tuple[ClipEncoder | None, str]:
    """The encoder, or why there is none."""
    if source is None:
        return None, "no CLIP model is given: name the folder of one with --evaluation.clip="
    try:
        return ClipEncoder(source), ""
    except InvDiffError as error:
        return None, str(error)


def _manifold_figures(metric: ManifoldScores) -> dict[str, Any]:
    try:
        return {name: float(value) for name, value in metric.compute().items()}
    except InvDiffError as error:  # a trial run of a few images should still get its other figures
        return {"reason": str(error)}


def unscored(data: BiasedDataModule) -> dict[str, Any]:
    """What ``metrics.json`` holds where there are no attribute labels."""
    names = ("scales", "data", "classifier", "frechet_distance")
    return {
        **dict.fromkeys(names),
        "samples_per_prompt": data.samples_per_prompt,
        "reason": data.why_not_scored,
    }


def balanced_rows(prompts: Tensor, attributes: Tensor) -> Tensor:
    """Rows with equally many images of each (prompt, attribute) cell: the first of each.

    Cells are those of the prompts that occur with every attribute class.

    Args:
        prompts: int64 ``[N]``.
        attributes: int64 ``[N]``.

    Returns:
        int64 row numbers, ascending.
    """
    classes = int(attributes.max()) + 1
    cells = prompts * classes + attributes
    sizes = cells.bincount(minlength=(int(prompts.max()) + 1) * classes).reshape(-1, classes)
    complete = (sizes > 0).all(1)
    if not complete.any():
        raise InvDiffError(
            "no prompt has test images of every attribute class, so there is no balanced set to "
            "measure the Fréchet distance to."
        )
    smallest = int(sizes[complete].min())
    order = cells.argsort(stable=True)
    starts = sizes.flatten().cumsum(0) - sizes.flatten()
    rank_in_cell = torch.empty_like(order)
    rank_in_cell[order] = torch.arange(len(order)) - starts[cells[order]]
    return ((rank_in_cell < smallest) & complete[prompts]).nonzero().squeeze(1)


def bias_figures(
    score: BiasScore, prompts: tuple[str, ...], classes: Sequence[str]
) -> dict[str, Any]:
    """A bias score's figures, JSON-ready."""
    values = {name: value.cpu() for name, value in score.compute().items()}
    return {
        "mean": float(values["mean"]),
        "std": float(values["std"]),
        "interval": values["mean_interval"].tolist(),
        "per_prompt": {
            prompt: {
                "bias": float(values["bias"][number]),
                "interval": values["interval"][number].tolist(),
                "counts": dict(zip(classes, values["counts"][number].tolist(), strict=True)),
                "total_variation": float(values["total_variation"][number]),
                "kl": float(values["kl"][number]),
                "balanced_sampler_would_show": float(values["small_sample_bias"][number]),
            }
            for number, prompt in enumerate(prompts)
        },
    }
