"""A quick look at bias and quality while an adapter or a backbone is being trained."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from invdiff_pl.callbacks.data import data_module
from invdiff_pl.callbacks.evaluation import start_scoring
from invdiff_pl.callbacks.live import LiveSamples
from invdiff_pl.metrics.sample_scores import SampleScores
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.utils.errors import InvDiffError

_LIVE = 0.0


class FitEvaluation(LiveSamples):
    """Scores a few samples of the live model every ``every_n_steps``; labels serve scoring only.

    The modules in training draw, as for :class:`~invdiff_pl.callbacks.SampleGrid`; ranks share the
    samples and add up their counts. It logs ``bias/ATTRIBUTE``, its 95 % interval, and
    ``val/samples/…``: ``prompt_accuracy``, ``frechet_distance``, ``precision``, ``recall``. With
    few samples these figures are rough, and Fréchet distances too high: they show a trend, while
    the samples stage gives the figures to report. Without labels or a trained classifier, it does
    nothing.

    Args:
        classifier: folder of a trained classifier.
        scoring: settings of the scoring; only the classifier and the main extractor are used.
        every_n_steps: number of steps between looks; there is one before training and one after.
        samples_per_prompt: number of samples per prompt drawn each time, from the same noises.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance.
        batch_size: number of samples drawn together on a rank.
        seed: seed of the noises.
    """

    def __init__(
        self,
        classifier: str,
        scoring: EvaluationSettings | None = None,
        every_n_steps: int = 200,
        samples_per_prompt: int = 16,
        steps: int = 12,
        guidance_scale: float = 2.0,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps, steps, guidance_scale, seed)
        self.classifier = Path(classifier)
        self.scoring = scoring or EvaluationSettings()
        self.samples_per_prompt = samples_per_prompt
        self.batch_size = batch_size
        self.figures: dict[str, float] = {}
        self._scores: SampleScores | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a look before training starts or resumes."""
        data = data_module(trainer)
        why = None if data.attributes() is not None else data.why_not_scored
        if why is None:
            try:
                sets = (_LIVE,)
                args = (trainer, pl_module, self.scoring, self.classifier, sets)
                self._scores = start_scoring(*args, few=True)[1][_LIVE]
            except InvDiffError as error:
                why = str(error)
        if why is not None and trainer.is_global_zero:
            print(f"samples are not scored during training: {why}", flush=True)
        self.look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a look after training, and release the networks that score."""
        self.look(trainer, pl_module)
        self._scores = None

    def show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Score this rank's share of the samples, and log the figures."""
        if self._scores is None:
            return
        data, device = data_module(trainer), module.device
        self._scores.reset()
        count = len(data.prompts) * self.samples_per_prompt
        mine = torch.arange(trainer.global_rank, count, trainer.world_size)
        sizes = self.samples_per_prompt, self.batch_size
        with torch.no_grad():
            for prompts, images in self.drawn(trainer, module, mine, *sizes, "quick look"):
                self._scores.update(prompts.to(device), images.to(device))
        self.figures = quick_figures(self._scores.figures(), data.attribute)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(self.figures, trainer.global_step)


def quick_figures(figures: dict[str, Any], attribute: str) -> dict[str, float]:
    """Return the scalars of a look by tag, without figures that could not be measured."""
    bias = figures["bias"]
    low, high = bias["interval"]
    found = {
        f"bias/{attribute}": bias["mean"],
        f"interval/{attribute}_low": low,
        f"interval/{attribute}_high": high,
        "val/samples/prompt_accuracy": figures["prompt_accuracy"]["mean"],
        "val/samples/frechet_distance": figures["frechet_distance"],
        "val/samples/precision": figures["manifold"].get("precision"),
        "val/samples/recall": figures["manifold"].get("recall"),
    }
    return {tag: value for tag, value in found.items() if isinstance(value, float)}
