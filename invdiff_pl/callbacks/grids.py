"""Pictures in TensorBoard: the same seeds before and during training."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from invdiff_pl.backbones.pipeline import sample_images
from invdiff_pl.callbacks.live import live_pipeline
from invdiff_pl.modules.common import stage_name
from invdiff_pl.utils.images import image_grid
from invdiff_pl.utils.progress import track


class SampleGrid(pl.Callback):
    """Samples every prompt from fixed seeds, with the weights as they stand, every so many steps.

    The live modules draw the samples; there is no second backbone in memory. Where an average of
    the weights is kept, it is the average that draws.

    Args:
        every_n_steps: between grids; one is drawn before training too.
        columns: samples a prompt.
        prompts: at most so many.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        batch_size: samples drawn together; all of them if not given.
        seed: of the noises.
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        columns: int = 8,
        prompts: int = 6,
        steps: int = 12,
        guidance_scale: float = 2.0,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.columns = columns
        self.prompts = prompts
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.batch_size = batch_size
        self.seed = seed
        self._drawn_at = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The grid before training, or where training goes on."""
        self._draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        """A grid every ``every_n_steps`` optimizer steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logger = trainer.logger
        fresh = self._drawn_at != trainer.global_step
        if not (trainer.is_global_zero and fresh and isinstance(logger, TensorBoardLogger)):
            return
        self._drawn_at = trainer.global_step
        with live_pipeline(trainer, pl_module) as pipeline:
            images = self._sample(pipeline, pl_module)
        grid = image_grid(images, self.columns)
        logger.experiment.add_image("samples/grid", grid, trainer.global_step)

    def _sample(self, pipeline: Any, module: pl.LightningModule) -> Tensor:
        conditions: Any = module.conditions
        frozen: Any = module.frozen
        count = min(self.prompts, len(conditions) - 1)
        numbers = torch.arange(count * self.columns)
        images = [
            sample_images(
                pipeline,
                conditions[indices // self.columns],
                conditions.null,
                indices.tolist(),
                seed=self.seed,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                resolution=frozen.resolution,
            )
            for indices in track(
                numbers.split(self.batch_size or len(numbers)),
                f"{stage_name(module)}, sample grid",
                unit="batch",
                bar=False,
            )
        ]
        return torch.cat(images)
