"""Drawing samples with the modules in training."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from invdiff_pl.adapters import Adapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import sample_images
from invdiff_pl.callbacks.ema import ExponentialMovingAverage
from invdiff_pl.modules.common import stage_name
from invdiff_pl.utils.progress import track


@contextmanager
def live_pipeline(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[Any]:
    """Yield the module's own pipeline, ready to sample, with no second backbone in memory.

    If an average of the weights is kept, the average draws. An adapter that wraps the denoiser
    takes its place. Afterwards weights, modes and denoiser are restored.
    """
    averages = [c for c in trainer.callbacks if isinstance(c, ExponentialMovingAverage)]  # type: ignore[attr-defined]
    pipeline: Any = module.pipeline
    pipeline.to(module.device)
    denoiser = frozen_denoiser(pipeline)
    adapter, own = getattr(module, "adapter", None), denoiser.network
    folded: AbstractContextManager[None] = nullcontext()
    if isinstance(adapter, Adapter):
        denoiser.network, folded = adapter.denoiser, adapter.folded()
    modes = {part: part.training for part in denoiser.network.modules()}
    denoiser.network.eval()
    for average in averages:
        average.swap(module)
    try:
        with folded, trainer.precision_plugin.forward_context():
            yield pipeline
    finally:
        for average in averages:
            average.restore(module)
        for part, training in modes.items():
            part.training = training
        denoiser.network = own


class LiveSamples(pl.Callback):
    """Base class that draws samples from fixed seeds, with the current weights, at intervals.

    Args:
        every_n_steps: number of steps between looks.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance.
        seed: seed of the noises.
    """

    def __init__(self, every_n_steps: int, steps: int, guidance_scale: float, seed: int) -> None:
        self.every_n_steps = every_n_steps
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.seed = seed
        self._looked_at = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a look before training starts or resumes."""
        self.look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        """Take a look every ``every_n_steps`` optimizer steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self.look(trainer, pl_module)

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw samples and show them, unless this was done at this step already."""
        if self._looked_at != trainer.global_step:
            self._looked_at = trainer.global_step
            self.show(trainer, pl_module)

    def show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw samples and show them."""

    def drawn(
        self,
        trainer: pl.Trainer,
        module: Any,
        indices: Tensor,
        per_prompt: int,
        batch: int,
        what: str,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield prompts int64 ``[B]`` and samples uint8 ``[B, 3, H, W]``, one batch at a time.

        Args:
            trainer: the trainer.
            module: module whose pipeline draws.
            indices: indices of the samples; each run of ``per_prompt`` belongs to one prompt.
            per_prompt: number of samples per prompt.
            batch: number of samples drawn together.
            what: what is drawn, as named in the progress.
        """
        conditions, told = module.conditions, f"{stage_name(module)}, {what}"
        with live_pipeline(trainer, module) as pipeline:
            for part in track(indices.split(batch), told, unit="batch", bar=False):
                prompts = part // per_prompt
                yield (
                    prompts,
                    sample_images(
                        pipeline,
                        conditions[prompts],
                        conditions.null,
                        part.tolist(),
                        seed=self.seed,
                        steps=self.steps,
                        guidance_scale=self.guidance_scale,
                        resolution=module.frozen.resolution,
                    ),
                )
