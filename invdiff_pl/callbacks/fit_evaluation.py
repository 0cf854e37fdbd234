"""A quick look at bias and quality while an adapter or a backbone is being trained."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from invdiff_pl.backbones.pipeline import sample_images
from invdiff_pl.callbacks.data import data_module
from invdiff_pl.callbacks.evaluation import start_scoring
from invdiff_pl.callbacks.live import live_pipeline
from invdiff_pl.metrics.sample_scores import SampleScores
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.modules.common import stage_name
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.progress import track

_LIVE = 0.0


class FitEvaluation(pl.Callback):
    """Scores a few samples of the live model every so many steps; labels serve scoring only.

    The modules that are trained draw, as :class:`~invdiff_pl.callbacks.SampleGrid` has them;
    ranks share the samples and add up. Logs ``bias/ATTRIBUTE``, its 95 % interval, and
    ``val/samples/…``: ``prompt_accuracy``, ``frechet_distance``, ``precision``, ``recall``. With
    few samples these are rough, and Fréchet distances too high: they tell a course, the samples
    stage tells figures. Does nothing where there are no labels or no trained classifier.

    Args:
        classifier: folder of a trained classifier.
        scoring: how samples are scored; only classifier and main extractor are used.
        every_n_steps: between looks; there is one before training and one after.
        samples_per_prompt: drawn each time, from the same noises.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        batch_size: samples drawn together on a rank.
        seed: of the noises.
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
        self.classifier = Path(classifier)
        self.scoring = scoring or EvaluationSettings()
        self.every_n_steps = every_n_steps
        self.samples_per_prompt = samples_per_prompt
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.batch_size = batch_size
        self.seed = seed
        self.figures: dict[str, float] = {}
        self._scores: SampleScores | None = None
        self._looked_at = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The look before training, or where training goes on."""
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
        self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        """A look every ``every_n_steps`` optimizer steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The look after training; the networks that score are let go."""
        self._look(trainer, pl_module)
        self._scores = None

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._scores is None or self._looked_at == trainer.global_step:
            return
        self._looked_at = trainer.global_step
        data = data_module(trainer)
        self._scores.reset()
        count = len(data.prompts) * self.samples_per_prompt
        mine = torch.arange(trainer.global_rank, count, trainer.world_size)
        with live_pipeline(trainer, pl_module) as pipeline, torch.no_grad():
            what = f"{stage_name(pl_module)}, quick look"
            for indices in track(mine.split(self.batch_size), what, unit="batch", bar=False):
                prompts = indices // self.samples_per_prompt
                images = self._draw(pipeline, pl_module, indices, prompts)
                device = pl_module.device
                self._scores.update(prompts.to(device), images.to(device))
        self.figures = quick_figures(self._scores.figures(), data.attribute)
        if trainer.logger is not None and trainer.is_global_zero:
            trainer.logger.log_metrics(self.figures, trainer.global_step)

    def _draw(
        self, pipeline: Any, module: pl.LightningModule, indices: Tensor, prompts: Tensor
    ) -> Tensor:
        conditions: Any = module.conditions
        frozen: Any = module.frozen
        return sample_images(
            pipeline,
            conditions[prompts],
            conditions.null,
            indices.tolist(),
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            resolution=frozen.resolution,
        )


def quick_figures(figures: dict[str, Any], attribute: str) -> dict[str, float]:
    """The scalars of a look, by tag; a figure that could not be taken has none."""
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
