"""The classifier that scores samples, trained on labelled held-out data."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from invdiff_pl.backbones.draws import generator
from invdiff_pl.data.datasets import LabelledBatch
from invdiff_pl.data.images import to_float
from invdiff_pl.data.training import Labels
from invdiff_pl.metrics.classifier import SMALL, SampleClassifier, require_trunk
from invdiff_pl.modules.common import (
    check_finite,
    optimizer_with_schedule,
    require_step_limit,
)
from invdiff_pl.utils.errors import InvDiffError


class AttributeClassifier(pl.LightningModule):
    """Trains a classifier of the attribute and the prompt of images, and tests it in validation.

    Any loader will do whose batches hold ``images``, uint8 ``[B, 3, H, W]``, and ``prompt`` and
    ``attribute``, int64 ``[B]``. With a DataModule that has labels, each (prompt, attribute) cell
    weighs the same; if it has none, nothing is trained. Labels serve the scoring of samples only:
    neither inference nor adapter training sees this network or what it was trained on.
    :class:`~invdiff_pl.callbacks.SaveClassifier` writes it.

    Args:
        prompts: prompts that numbers in batches stand for, if no DataModule sets them.
        attributes: names of the attribute's classes, if no DataModule sets them.
        trunk: see :class:`~invdiff_pl.metrics.classifier.SampleClassifier`.
        learning_rate: peak rate of AdamW.
        weight_decay: weight decay of AdamW.
        seed: seed of the weights and of the augmentation.

    Attributes:
        confusion: images of the last validation by true and predicted class, int64 ``[K, K]``.
        accuracies: accuracies of ``attribute`` and ``prompt`` in the last validation.

    Raises:
        ValueError: if there is no such trunk.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> rows = [{"images": pixels[n], "prompt": n % 2, "attribute": n // 4} for n in range(8)]
        >>> loader = DataLoader(rows, batch_size=4)
        >>> module = AttributeClassifier(["a nurse", "a pilot"], ["woman", "man"])
        >>> trainer = pl.Trainer(
        ...     max_steps=2,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_model_summary=False,
        ...     enable_progress_bar=False,
        ... )
        >>> trainer.fit(module, loader, loader)
        >>> int(module.confusion.sum()), sorted(module.accuracies)
        (8, ['attribute', 'prompt'])
    """

    stage = "classifier"

    def __init__(
        self,
        prompts: Sequence[str] = (),
        attributes: Sequence[str] = (),
        trunk: str = SMALL,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.require_settings(self.hparams)
        self.labels = Labels(tuple(prompts), tuple(attributes))
        self.trunk = trunk
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.seed = seed
        self.network: SampleClassifier | None = None
        self.resolution = 0  # of the images, once some have been seen
        self.confusion = torch.zeros((0, 0), dtype=torch.int64)
        self.accuracies: dict[str, float] = {}

    @staticmethod
    def require_settings(settings: Mapping[str, Any]) -> None:
        """Check the settings before a network is built.

        Args:
            settings: all of the constructor's arguments.

        Raises:
            InvDiffError: naming the first setting that is wrong.
        """
        require_trunk(settings["trunk"])

    def use_labels(self, labels: Labels) -> None:
        """Set the names of prompts and classes, and the number of images of each."""
        self.labels = labels

    def configure_model(self) -> None:
        """Build the network once the classes are known."""
        if self.network is None:
            names = self.labels
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                classes = max(1, len(names.attributes))
                self.network = SampleClassifier(classes, len(names.prompts), self.trunk)

    def setup(self, stage: str) -> None:
        """Compute weights that make every (prompt, attribute) cell count the same.

        Raises:
            ValueError: if there are no names of prompts or of classes.
        """
        names = self.labels
        if names.missing is not None:
            self.trainer.limit_train_batches = 0
            return
        for argument in ("prompts", "attributes"):
            if not getattr(names, argument):
                raise InvDiffError(f"{argument}: none are named; expected at least one.", argument)
        shape = (len(names.prompts), len(names.attributes))
        counts = torch.ones(shape, dtype=torch.int64) if names.counts is None else names.counts
        weights = counts.sum() / (shape[0] * shape[1] * counts.clamp(min=1))
        self.register_buffer("cell_weights", weights, persistent=False)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of both heads on augmented images."""
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

    def on_validation_epoch_start(self) -> None:
        """Reset the counts."""
        classes = len(self.labels.attributes)
        self._counts = torch.zeros((classes, classes), dtype=torch.int64, device=self.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self.device)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Count the attribute's answers, by true and predicted class, and right prompts."""
        assert self.network is not None
        self.resolution = batch["images"].shape[-1]
        attribute_logits, prompt_logits = self.network(to_float(batch["images"]))
        cells = batch["attribute"] * len(self._counts) + attribute_logits.argmax(1)
        counts = cells.bincount(minlength=self._counts.numel())
        self._counts += counts.view_as(self._counts)
        self._correct += (prompt_logits.argmax(1) == batch["prompt"]).sum()

    def on_validation_epoch_end(self) -> None:
        """Compute the accuracies over all ranks."""
        counts = torch.cat([self._counts.flatten(), self._correct[None]])
        *cells, correct = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self.confusion = torch.tensor(cells).view_as(self._counts)
        seen = int(self.confusion.sum())
        right = {"attribute": int(self.confusion.trace()), "prompt": correct}
        self.accuracies = {name: count / seen for name, count in right.items()}
        for name, accuracy in self.accuracies.items():
            self.log(f"val/{name}_accuracy", accuracy, prog_bar=True, rank_zero_only=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW with warm-up and cosine decay."""
        require_step_limit(self)
        return optimizer_with_schedule(
            self, list(self.parameters()), self.learning_rate, self.weight_decay, 20
        )


def augment(images: Tensor, source: torch.Generator) -> Tensor:
    """Shift, tint, blur and roughen images, to imitate flaws of a model's samples.

    Args:
        images: float ``[B, 3, H, W]`` in [-1, 1].
        source: generator on the CPU.

    Returns:
        images of the same shape.
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
