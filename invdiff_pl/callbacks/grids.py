"""Pictures in TensorBoard: the same seeds before and during training."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from invdiff_pl.callbacks.live import LiveSamples
from invdiff_pl.utils.images import image_grid


class SampleGrid(LiveSamples):
    """Samples every prompt from fixed seeds, with the current weights, every ``every_n_steps``.

    The live modules draw the samples; there is no second backbone in memory. If an average of the
    weights is kept, the average draws.

    Args:
        every_n_steps: number of steps between grids; one is drawn before training, too.
        columns: number of samples per prompt.
        prompts: maximum number of prompts.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance.
        batch_size: number of samples drawn together; all of them if not given.
        seed: seed of the noises.
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
        super().__init__(every_n_steps, steps, guidance_scale, seed)
        self.columns = columns
        self.prompts = prompts
        self.batch_size = batch_size

    def show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write a grid, on the first rank."""
        logger, conditions = trainer.logger, module.conditions
        if not (trainer.is_global_zero and isinstance(logger, TensorBoardLogger)):
            return
        count = min(self.prompts, len(conditions) - 1) * self.columns  # type: ignore[arg-type]
        batch = self.batch_size or count
        parts = self.drawn(trainer, module, torch.arange(count), self.columns, batch, "sample grid")
        grid = image_grid(torch.cat([images for _, images in parts]), self.columns)
        logger.experiment.add_image("samples/grid", grid, trainer.global_step)
