"""The classifier that scores samples, trained on labelled held-out data."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from invdiff_pl.backbones.draws import generator
from invdiff_pl.data.datasets import LabelledBatch
from invdiff_pl.data.images import to_float
from invdiff_pl.metrics.classifier import CONFIG_FILE, SMALL, SampleClassifier, require_trunk
from invdiff_pl.modules.common import (
    check_finite,
    data_module,
    optimizer_with_schedule,
    output_folder,
    require_step_limit,
)
from invdiff_pl.utils.files import atomic_path, write_json


class AttributeClassifier(pl.LightningModule):
    """Learns attribute and prompt from the val split and is tested on the test split.

    Labels serve the scoring of samples only: neither inference nor adapter training sees this
    network or what it was trained on. Each (prompt, attribute) cell weighs the same. Without labels
    nothing is trained, and ``classifier.json`` says so.

    Args:
        output: folder; the classifier is written to its ``classifier`` folder.
        trunk: see :class:`~invdiff_pl.metrics.classifier.SampleClassifier`.
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW.
        seed: of weights and augmentation.
    """

    def __init__(
        self,
        output: str,
        trunk: str = SMALL,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.require_settings(self.hparams)
        self.output = output
        self.trunk = trunk
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.seed = seed
        self.network: SampleClassifier | None = None
        self.labelled = True
        self.confusion: Tensor
        self.correct: Tensor

    @staticmethod
    def require_settings(settings: Mapping[str, Any]) -> None:
        """Refuse settings before a network is built.

        Args:
            settings: all of the constructor's arguments.

        Raises:
            InvDiffError: naming the first that is wrong.
        """
        require_trunk(settings["trunk"])

    def configure_model(self) -> None:
        """Build the network once the classes are known."""
        if self.network is None:
            data = data_module(self)
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                classes = max(1, len(data.attribute_names))
                self.network = SampleClassifier(classes, len(data.prompts), self.trunk)

    def setup(self, stage: str) -> None:
        """Weights that make every (prompt, attribute) cell count the same."""
        data = data_module(self)
        self.labelled = data.attributes() is not None
        if not self.labelled:
            self.trainer.limit_train_batches = 0
            return
        prompts, attributes = data.labels("val")
        assert attributes is not None
        shape = (len(data.prompts), len(data.attribute_names))
        counts = torch.bincount(prompts * shape[1] + attributes, minlength=shape[0] * shape[1])
        weights = counts.sum() / (shape[0] * shape[1] * counts.clamp(min=1))
        self.register_buffer("cell_weights", weights.reshape(shape), persistent=False)
        self.zero_counts()

    def zero_counts(self) -> None:
        """Forget what validation has counted."""
        classes = len(data_module(self).attribute_names)
        self.confusion = torch.zeros((classes, classes), dtype=torch.int64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of both heads on augmented images."""
        source = generator(self.seed, "augmentation", self.global_step, self.global_rank)
        images = augment(to_float(batch["images"]), source)
        assert self.network is not None
        attribute_logits, prompt_logits = self.network(images)
        weights = self.cell_weights[batch["prompt"], batch["attribute"]]  # type: ignore[index]
        losses = functional.cross_entropy(
            attribute_logits, batch["attribute"], reduction="none", label_smoothing=0.05
        ) + functional.cross_entropy(
            prompt_logits, batch["prompt"], reduction="none", label_smoothing=0.05
        )
        loss = (weights * losses).mean()
        check_finite(loss, self)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Count answers: the attribute's by true and told class, and right prompts."""
        assert self.network is not None
        attribute_logits, prompt_logits = self.network(to_float(batch["images"]))
        cells = batch["attribute"] * len(self.confusion) + attribute_logits.argmax(1)
        counts = cells.bincount(minlength=self.confusion.numel())
        self.confusion += counts.view_as(self.confusion)
        self.correct += (prompt_logits.argmax(1) == batch["prompt"]).sum()

    def on_validation_epoch_end(self) -> None:
        """Accuracy over all ranks."""
        counts = torch.cat([self.confusion.flatten(), self.correct[None]])
        *cells, correct = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        confusion = torch.tensor(cells).view_as(self.confusion)
        self.held_out_confusion = confusion.tolist()
        seen = int(confusion.sum())
        self.accuracies = {"attribute": int(confusion.trace()) / seen, "prompt": correct / seen}
        for name, accuracy in self.accuracies.items():
            self.log(f"val/{name}_accuracy", accuracy, prog_bar=True, rank_zero_only=True)
        self.zero_counts()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine."""
        require_step_limit(self)
        return optimizer_with_schedule(
            self, list(self.parameters()), self.learning_rate, self.weight_decay, 20
        )

    def on_fit_end(self) -> None:
        """Write the classifier and its held-out accuracy."""
        if not self.trainer.is_global_zero:
            return
        assert self.network is not None
        data = data_module(self)
        if not self.labelled:
            print(f"no classifier is trained: {data.why_not_scored}")
            absent = {"absent": data.why_not_scored}
            write_json(output_folder(self.output) / "classifier" / CONFIG_FILE, absent)
            return
        facts = {
            "attribute_names": list(data.attribute_names),
            "prompts": list(data.prompts),
            "resolution": data.resolution,
            "held_out_accuracy": self.accuracies,
            # True class by told class, of the attribute.
            "held_out_confusion": {"attribute": self.held_out_confusion},
            "held_out_images": len(data.index.rows("test")),
        }
        with atomic_path(output_folder(self.output) / "classifier") as partial:
            partial.mkdir()
            self.network.save(partial, facts)


def augment(images: Tensor, source: torch.Generator) -> Tensor:
    """Shift, tint, blur and roughen images, as samples of a model may be off.

    Args:
        images: float ``[B, 3, H, W]`` in [-1, 1].
        source: CPU generator.

    Returns:
        of the same shape.
    """
    count, _, height, width = images.shape
    device = images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand((count, *shape), generator=source)).to(device)

    transform = torch.zeros((count, 2, 3), device=device)
    zoom = uniform(0.9, 1.1)
    transform[:, 0, 0] = transform[:, 1, 1] = zoom
    transform[:, :, 2] = uniform(-0.12, 0.12, 2)
    grid = functional.affine_grid(transform, [count, 3, height, width], align_corners=False)
    images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    images = images * uniform(0.85, 1.15, 3, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    blurred = nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    share = uniform(0.0, 1.0, 1, 1, 1).square()
    images = share * blurred + (1 - share) * images
    noise = torch.randn(images.shape, generator=source).to(device)
    return images + uniform(0.0, 0.08, 1, 1, 1) * noise
