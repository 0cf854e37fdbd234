"""Writing the results of training to disk."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from invdiff_pl.backbones.pipeline import save_pipeline
from invdiff_pl.callbacks.data import data_module
from invdiff_pl.data.images import to_float
from invdiff_pl.metrics.classifier import CONFIG_FILE
from invdiff_pl.modules.attribute_classifier import AttributeClassifier
from invdiff_pl.modules.autoencoder import Autoencoder
from invdiff_pl.modules.backbone import Backbone
from invdiff_pl.modules.invariant_adapter import UNTRAINED, InvariantAdapter
from invdiff_pl.utils.files import atomic_path, write_json


class SaveAdapter(pl.Callback):
    """Writes the trained adapter into the folder ``adapter`` of ``output``.

    This callback must come after those that choose or change the weights.

    Args:
        output: folder to write to, created if missing.
    """

    changes_result = True

    def __init__(self, output: str) -> None:
        self.output = output

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the adapter with the weights that earlier callbacks put in place."""
        assert isinstance(pl_module, InvariantAdapter)
        if not trainer.is_global_zero:
            return
        facts: dict[str, Any] = {
            "trained": pl_module.trains,
            "architecture": pl_module.frozen.architecture,
            "candidates": list(pl_module.environments.candidates),
        }
        if pl_module.withheld is not None:
            facts["reason"] = UNTRAINED.format(why=pl_module.withheld)
        with atomic_path(Path(self.output) / "adapter") as partial:
            pl_module.adapter.save(partial, **facts)


class SavePipeline(pl.Callback):
    """Writes a trained backbone or autoencoder into the folder ``pipeline`` of ``output``.

    The folder holds an ordinary pipeline. This callback must come after those that change the
    weights.

    Args:
        output: folder to write to, created if missing.
        half_precision: whether to write float16 weights.
    """

    changes_result = True

    def __init__(self, output: str, half_precision: bool = False) -> None:
        self.output, self.half_precision = output, half_precision

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the pipeline, with the averaged weights if an EMA callback put them in place."""
        assert isinstance(pl_module, Backbone | Autoencoder)
        if not trainer.is_global_zero:
            return
        dtype = torch.float16 if self.half_precision else torch.float32
        with atomic_path(Path(self.output) / "pipeline") as partial:
            save_pipeline(pl_module.result().to(dtype), partial)


class LatentScale(pl.Callback):
    """Sets the factor that scales an autoencoder's latents to unit variance.

    Args:
        images: uint8 ``[N, 3, H, W]``, images that it is measured on; the first images of the train
            split of the trainer's DataModule if not given.
        count: maximum number of images taken from the DataModule.
    """

    changes_result = True

    def __init__(self, images: Tensor | None = None, count: int = 1024) -> None:
        self.images, self.count = images, count

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and set the factor, on the rank that writes the pipeline."""
        assert isinstance(pl_module, Autoencoder)
        if not trainer.is_global_zero:
            return
        if (some := self.images) is None:
            train = data_module(trainer).images("train")
            some = train.gather(torch.arange(min(len(train), self.count)))
        pixels = to_float(some.to(pl_module.device))
        pl_module.vae.eval()
        latents = pl_module.posterior(pixels).mean
        pl_module.vae.register_to_config(scaling_factor=float(1 / latents.std()))


class SaveClassifier(pl.Callback):
    """Writes a trained classifier and its held-out accuracy into ``classifier`` of ``output``.

    If there were no labels, ``classifier.json`` says so.

    Args:
        output: folder to write to, created if missing.
    """

    changes_result = True

    def __init__(self, output: str) -> None:
        self.output = output

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the classifier."""
        assert isinstance(pl_module, AttributeClassifier)
        if not trainer.is_global_zero:
            return
        folder, labels = Path(self.output) / "classifier", pl_module.labels
        if labels.missing is not None:
            print(f"no classifier was trained: {labels.missing}")
            write_json(folder / CONFIG_FILE, {"absent": labels.missing})
            return
        facts = {
            "attribute_names": list(labels.attributes),
            "prompts": list(labels.prompts),
            "resolution": pl_module.resolution,
            "held_out_accuracy": pl_module.accuracies,
            # The attribute's true class by predicted class.
            "held_out_confusion": {"attribute": pl_module.confusion.tolist()},
            "held_out_images": int(pl_module.confusion.sum()),
        }
        assert pl_module.network is not None
        with atomic_path(folder) as partial:
            partial.mkdir()
            pl_module.network.save(partial, facts)
