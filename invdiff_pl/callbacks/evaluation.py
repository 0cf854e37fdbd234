"""Scoring of samples while they are drawn: bias, prompt accuracy, distances, recall."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from invdiff_pl.callbacks.data import data_module
from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.metrics import BiasScore
from invdiff_pl.metrics.reference import DESCRIPTION, reference_features, reference_rows
from invdiff_pl.metrics.sample_scores import SampleScores, bias_figures
from invdiff_pl.metrics.scorers import CMMD, MAIN, Scorers, encoder_identity
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.modules.conditional_sampler import ConditionalSampler, SampledBatch
from invdiff_pl.utils.files import write_json

_BATCH = 1024


class SampleEvaluation(pl.Callback):
    """Scores what a :class:`ConditionalSampler` draws, on every rank, and writes ``metrics.json``.

    It works in ``predict`` and in ``test``. Ranks add up their sums and gather their features, so
    the figures do not depend on the number of ranks. Distances, precision and recall are relative
    to a *balanced* reference: equally many test images of each (prompt, attribute) cell. What
    cannot be measured for lack of weights is reported in one line, and has a reason in place of a
    figure. Without attribute labels every figure is ``null``, and the reason is given.

    Args:
        output: folder that ``metrics.json`` is written to.
        classifier: folder of a trained classifier.
        scoring: settings of the scoring; the defaults if not given.
    """

    changes_result = True

    def __init__(
        self, output: str, classifier: str, scoring: EvaluationSettings | None = None
    ) -> None:
        self.output = Path(output)
        self.classifier_folder = Path(classifier)
        self.scoring = scoring or EvaluationSettings()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the networks, make a set of metrics per scale, and add the reference to each."""
        assert isinstance(pl_module, ConditionalSampler)
        data = data_module(trainer)
        self.scored = data.attributes() is not None
        if not self.scored:
            return
        self.scorers, self.scores = start_scoring(
            trainer, pl_module, self.scoring, self.classifier_folder, pl_module.scales
        )

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: SampledBatch,
        *unused: Any,
    ) -> None:
        """Score a batch at every scale."""
        if self.scored and len(outputs["prompt"]) > 0:
            prompts = outputs["prompt"].to(pl_module.device)
            for scale, images in outputs["images"].items():
                self.scores[scale].update(prompts, images.to(pl_module.device))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute all figures and write them."""
        data = data_module(trainer)
        report = self._report(data) if self.scored else unscored(data)
        if trainer.is_global_zero:
            write_json(self.output / "metrics.json", report)

    on_test_start = on_predict_start
    on_test_batch_end = on_predict_batch_end  # type: ignore[assignment]
    on_test_end = on_predict_end

    def _report(self, data: BiasedDataModule) -> dict[str, Any]:
        # Every rank counts the whole split, so there is nothing to add up.
        sizes = (len(data.prompts), len(data.attribute_names))
        aim = None if self.scoring.target is None else torch.tensor(self.scoring.target)
        own = BiasScore(*sizes, target=aim, sync_on_compute=False)
        prompts, attributes = data.labels("train")
        assert attributes is not None
        own.update(prompts, attributes)
        facts = {
            "backend": "torchmetrics",
            "reference": DESCRIPTION,
            "reference_images": len(reference_rows(data)),
            "n": data.samples_per_prompt * len(data.prompts),
        }
        extractors = self.scorers.extractors
        distances = {
            figure: {**facts, "extractor": extractor.name, "resize": extractor.input_size}
            for figure, extractor in extractors.items()
        }
        if self.scorers.clip is not None:
            distances[CMMD] = {
                **facts,
                "backend": "invdiff-pl",
                "extractor": f"clip {self.scoring.clip}",
                "resize": self.scorers.clip.input_size,
            }
        return {
            "scales": {str(scale): scores.figures() for scale, scores in self.scores.items()},
            "attribute": data.attribute,
            "data": {"bias": bias_figures(own, data.prompts, data.attribute_names)},
            "samples_per_prompt": data.samples_per_prompt,
            "classifier": self.scorers.facts["held_out_accuracy"],
            "frechet_distance": distances.pop(MAIN, facts),
            "distances": distances,
            "manifold": {"neighbours": self.scoring.neighbours},
        }


def start_scoring(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    settings: EvaluationSettings,
    classifier: Path,
    sets: tuple[float, ...],
    *,
    few: bool = False,
) -> tuple[Scorers, dict[float, SampleScores]]:
    """Load the scoring networks, and make metrics with the reference for several sets of samples.

    Args:
        trainer: trainer whose ranks share the work.
        pl_module: module on whose device the metrics are.
        settings: settings of the scoring.
        classifier: folder of the trained classifier.
        sets: names of the sets.
        few: load only what a quick look during training needs.

    Raises:
        InvDiffError: if there is no classifier of the data set's prompts, or a setting is wrong.
    """
    data, device = data_module(trainer), pl_module.device
    scorers = Scorers.load(settings, classifier, data, few=few).to(device)
    if trainer.is_global_zero:
        for notice in scorers.notices(settings):
            print(notice, flush=True)
    names = (data.prompts, data.attribute_names)
    scores = {
        name: SampleScores(scorers, *names, settings.neighbours, settings.target, device)
        for name in sets
    }
    rows = reference_rows(data)
    mine = torch.arange(trainer.global_rank, len(rows), trainer.world_size)
    encoders: dict[str, Any] = dict(scorers.extractors)
    if scorers.clip is not None:
        encoders[CMMD] = scorers.clip
    for figure, encoder in encoders.items():
        features = reference_features(
            data,
            rows,
            lambda images, encoder=encoder: encoder(images.to(device)),  # type: ignore[misc]
            encoder_identity(encoder.name, encoder, encoder.input_size),
            build=trainer.local_rank == 0,
            barrier=trainer.strategy.barrier,
        )
        for chunk in mine.split(_BATCH):
            for metrics in scores.values():
                metrics.update_reference(figure, features.gather(chunk).to(device))
    return scorers, scores


def unscored(data: BiasedDataModule) -> dict[str, Any]:
    """Return what ``metrics.json`` holds if there are no attribute labels."""
    names = ("scales", "data", "classifier", "frechet_distance")
    return {
        **dict.fromkeys(names),
        "samples_per_prompt": data.samples_per_prompt,
        "reason": data.why_not_scored,
    }
