"""All figures of one set of samples, accumulated batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from invdiff_pl.data.images import to_float
from invdiff_pl.metrics.accuracy import PromptAccuracy
from invdiff_pl.metrics.bias import BiasScore
from invdiff_pl.metrics.clip import ClipScore
from invdiff_pl.metrics.correction import correct_for_classifier
from invdiff_pl.metrics.discrepancy import MaximumMeanDiscrepancy
from invdiff_pl.metrics.frechet import FrechetDistance
from invdiff_pl.metrics.manifold import ManifoldScores
from invdiff_pl.metrics.scorers import CLIP_T, CMMD, MAIN, Scorers
from invdiff_pl.utils.errors import InvDiffError


class SampleScores:
    """The metrics of one set of samples, on one device; ranks are combined by :meth:`figures`.

    Args:
        scorers: networks that score samples, on the device.
        prompts: the distinct prompts.
        attribute_names: names of the attribute's classes.
        neighbours: number of neighbours for precision and recall.
        target: wanted shares of the attribute's classes; even ones if not given.
        device: device of the metrics.
    """

    def __init__(
        self,
        scorers: Scorers,
        prompts: Sequence[str],
        attribute_names: Sequence[str],
        neighbours: int,
        target: Sequence[float] | None,
        device: torch.device,
    ) -> None:
        self.scorers = scorers
        self.prompts, self.attribute_names = tuple(prompts), tuple(attribute_names)
        count, classes = len(prompts), len(attribute_names)
        aim = None if target is None else torch.tensor(target)
        self.bias = BiasScore(count, classes, target=aim).to(device)
        self.accuracy = PromptAccuracy(count).to(device)
        self.distances = {
            figure: FrechetDistance(extractor).to(device)
            for figure, extractor in scorers.extractors.items()
        }
        self.manifold: ManifoldScores | None = None
        if MAIN in scorers.extractors:
            features = scorers.extractors[MAIN].num_features
            self.manifold = ManifoldScores(features, neighbours).to(device)
        self.clip: ClipScore | None = None
        if scorers.clip is not None:
            self.clip = ClipScore(scorers.clip, prompts).to(device)
            self.cmmd = MaximumMeanDiscrepancy(scorers.clip.num_features).to(device)
        self.both: BiasScore | None = None
        if scorers.second is not None:
            others = len(scorers.second_facts["attribute_names"])
            self.both = BiasScore(count, (classes, others)).to(device)

    def update_reference(self, figure: str, features: Tensor) -> None:
        """Add features ``[N, D]`` of real images, from the encoder that a figure is based on."""
        if figure == CMMD:
            self.cmmd.update(features, real=True)
            return
        self.distances[figure].update_features(features, real=True)
        if figure == MAIN and self.manifold is not None:
            self.manifold.update(features, real=True)

    def update(self, prompts: Tensor, images: Tensor) -> None:
        """Add samples.

        Args:
            prompts: number of each sample's prompt, int64 ``[N]``, on the metrics' device.
            images: uint8 ``[N, 3, H, W]``, on the same device.
        """
        pixels = to_float(images)
        attribute_logits, prompt_logits = self.scorers.classifier(pixels)
        attributes = attribute_logits.argmax(1)
        self.bias.update(prompts, attributes)
        self.accuracy.update(prompts, prompt_logits.argmax(1))
        if self.both is not None and self.scorers.second is not None:
            self.both.update(prompts, attributes, self.scorers.second(pixels)[0].argmax(1))
        for figure, distance in self.distances.items():
            features = self.scorers.extractors[figure](images)
            distance.update_features(features, real=False)
            if figure == MAIN and self.manifold is not None:
                self.manifold.update(features, real=False)
        if self.clip is not None and self.scorers.clip is not None:
            embeddings = self.scorers.clip.encode_images(images)
            self.clip.update_embeddings(prompts, embeddings)
            self.cmmd.update(embeddings, real=False)

    def reset(self) -> None:
        """Forget the samples, but not the reference."""
        for metric in self._metrics():
            metric.reset()

    def _metrics(self) -> Iterator[Metric]:
        yield from (self.bias, self.accuracy, *self.distances.values())
        for metric in (self.manifold, self.both):
            if metric is not None:
                yield metric
        if self.clip is not None:
            yield from (self.clip, self.cmmd)

    def figures(self) -> dict[str, Any]:
        """Compute all figures, JSON-serialisable, over all ranks' samples; every rank calls it."""
        left_out = self.scorers.left_out
        distances: dict[str, Any] = {
            figure: _or_reason(metric, float) for figure, metric in self.distances.items()
        }
        absent = {figure: {"reason": reason} for figure, reason in left_out.items()}
        main = distances.pop(MAIN, absent.get(MAIN))
        found = {
            "bias": self._bias(),
            "prompt_accuracy": self._accuracy(),
            "frechet_distance": main,
            "manifold": self._manifold(),
            "distances": {
                **{n: r for n, r in absent.items() if n not in (MAIN, CLIP_T)},
                **distances,
            },
            "clip_t": self._clip(),
        }
        if self.clip is not None:
            found["distances"][CMMD] = _or_reason(self.cmmd, float)
        if self.both is not None:
            found["intersection"] = self._intersection(self.both)
        return found

    def _bias(self) -> dict[str, Any]:
        figures = bias_figures(self.bias, self.prompts, self.attribute_names)
        confusion = self.scorers.facts.get("held_out_confusion")
        if confusion is None:
            why = "the classifier was trained by an older version: rerun the classifier stage"
            return {**figures, "classifier_corrected": {"reason": why}}
        counts = self.bias.compute()["counts"]
        try:
            rates = correct_for_classifier(counts, torch.tensor(confusion["attribute"]))
        except InvDiffError as error:
            return {**figures, "classifier_corrected": {"reason": str(error)}}
        per_prompt = zip(self.prompts, rates.bias.tolist(), rates.interval.tolist(), strict=True)
        corrected = {
            "mean": float(rates.mean),
            "interval": rates.mean_interval.tolist(),
            "per_prompt": {p: {"bias": bias, "interval": ends} for p, bias, ends in per_prompt},
        }
        return {**figures, "classifier_corrected": corrected}

    def _accuracy(self) -> dict[str, Any]:
        found = self.accuracy.compute()
        counts = found["counts"].double()
        shares = (counts[:, 1] / counts.sum(1)).tolist()
        return {
            "mean": float(found["mean"]),
            "interval": found["interval"].tolist(),
            "per_prompt": dict(zip(self.prompts, shares, strict=True)),
        }

    def _manifold(self) -> Any:
        if self.manifold is None:
            return {"reason": self.scorers.left_out.get(MAIN, "not measured here")}
        return _or_reason(self.manifold, lambda found: {n: float(v) for n, v in found.items()})

    def _clip(self) -> dict[str, Any]:
        if self.clip is None:
            return {"reason": self.scorers.left_out.get(CLIP_T, "not measured here")}
        found = self.clip.compute()
        per_prompt = dict(zip(self.prompts, found["per_prompt"].tolist(), strict=True))
        return {"mean": float(found["mean"]), "per_prompt": per_prompt}

    def _intersection(self, metric: BiasScore) -> dict[str, Any]:
        second = self.scorers.second_facts["attribute_names"]
        names = [f"{one} × {other}" for one in self.attribute_names for other in second]
        return {
            "second_attribute": second,
            **bias_figures(metric, self.prompts, names),
        }


def bias_figures(
    score: BiasScore, prompts: Sequence[str], classes: Sequence[str]
) -> dict[str, Any]:
    """Return a bias score's figures, JSON-serialisable."""
    values = {name: value.cpu() for name, value in score.compute().items()}
    return {
        "mean": float(values["mean"]),
        "std": float(values["std"]),
        "interval": values["mean_interval"].tolist(),
        "corrected_mean": float(values["corrected_mean"]),
        "target": "even" if score.target is None else score.target.tolist(),
        "per_prompt": {
            prompt: {
                "bias": float(values["bias"][number]),
                "interval": values["interval"][number].tolist(),
                "counts": dict(zip(classes, values["counts"][number].tolist(), strict=True)),
                "corrected": float(values["corrected"][number]),
                "total_variation": float(values["total_variation"][number]),
                "kl": float(values["kl"][number]),
                "balanced_sampler_would_show": float(values["small_sample_bias"][number]),
            }
            for number, prompt in enumerate(prompts)
        },
    }


def _or_reason(metric: Metric, convert: Callable[[Any], Any]) -> Any:
    """Return a metric's value, or the reason for none, so that few images give other figures."""
    try:
        return convert(metric.compute())
    except InvDiffError as error:
        if (
            metric._is_synced
        ):  # an error within torchmetrics' context leaves the ranks' sum in place
            metric.unsync()
        return {"reason": str(error)}
