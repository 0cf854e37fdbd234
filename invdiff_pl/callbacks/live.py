"""Drawing samples with the modules that are being trained."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl

from invdiff_pl.adapters import Adapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.callbacks.ema import ExponentialMovingAverage


@contextmanager
def live_pipeline(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[Any]:
    """The module's own pipeline, ready to sample: there is no second backbone in memory.

    Where an average of the weights is kept, it is the average that draws. An adapter that wraps the
    denoiser takes its place. Afterwards weights, modes and denoiser are what they were.
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
