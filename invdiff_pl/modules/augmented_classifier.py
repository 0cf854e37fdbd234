"""A use of debiased samples: a classifier of the prompt that is also trained on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from invdiff_pl.backbones.draws import generator
from invdiff_pl.data.datasets import LabelledBatch
from invdiff_pl.data.images import to_float
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.data.samples import read_samples
from invdiff_pl.data.training import Labels
from invdiff_pl.metrics.classifier import SMALL, SampleClassifier, require_trunk
from invdiff_pl.modules.attribute_classifier import augment
from invdiff_pl.modules.common import check_finite, optimizer_with_schedule, require_step_limit
from invdiff_pl.utils.errors import InvDiffError

NAMES = ("real", "augmented")


class AugmentedClassifier(pl.LightningModule):
    """Trains two classifiers of the prompt: on real images alone, and on real and debiased ones.

    Both start from the same weights and see equally many images in equally many steps; for the
    second, a share of each batch is replaced by samples. Neither sees an attribute. Any loader will
    do whose batches hold ``images``, uint8 ``[B, 3, H, W]``, and ``prompt``, int64 ``[B]``.
    :class:`~invdiff_pl.callbacks.GroupAccuracy` tests both in each (prompt, attribute) group.

    Args:
        samples: debiased images with prompts; or the folder of the samples stage, from which the
            samples at the highest invariant scale are taken.
        prompts: prompts that numbers in batches stand for, if no DataModule sets them.
        generated_share: share of generated images in the second network's batches, in (0, 1).
        trunk: see :class:`~invdiff_pl.metrics.classifier.SampleClassifier`.
        learning_rate: peak rate of AdamW.
        weight_decay: weight decay of AdamW.
        seed: seed of the weights, the augmentation and the choice of samples.

    Attributes:
        networks: the two networks, by :data:`NAMES`.

    Raises:
        ValueError: if a setting is wrong.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> rows = [{"images": pixels[n], "prompt": n % 2} for n in range(8)]
        >>> drawn = PromptedImages(pixels, ["a nurse", "a pilot"] * 4)
        >>> module = AugmentedClassifier(drawn, ["a nurse", "a pilot"])
        >>> trainer = pl.Trainer(
        ...     max_steps=2,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_model_summary=False,
        ...     enable_progress_bar=False,
        ... )
        >>> trainer.fit(module, DataLoader(rows, batch_size=4))
        >>> sorted(module.networks)
        ['augmented', 'real']
    """

    stage = "augmentation"

    def __init__(
        self,
        samples: str | PromptedImages,
        prompts: Sequence[str] = (),
        generated_share: float = 0.5,
        trunk: str = SMALL,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(samples, str) else ["samples"])
        self.require_settings(self.hparams)
        self.samples = samples
        self.labels = Labels(tuple(prompts))
        self.generated_share = generated_share
        self.trunk = trunk
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.seed = seed
        self.networks: nn.ModuleDict | None = None

    @staticmethod
    def require_settings(settings: Mapping[str, Any]) -> None:
        """Check the settings before a network is built.

        Args:
            settings: all of the constructor's arguments.

        Raises:
            InvDiffError: naming the first setting that is wrong.
        """
        require_trunk(settings["trunk"])
        if not 0 < (share := settings["generated_share"]) < 1:
            raise InvDiffError(
                f"generated_share={share}: expected a share between 0 and 1.", "generated_share"
            )

    def use_labels(self, labels: Labels) -> None:
        """Set the names of the prompts."""
        self.labels = labels

    def configure_model(self) -> None:
        """Build two equal networks once the prompts are known."""
        if self.networks is None:
            networks = {}
            for name in NAMES:
                with torch.random.fork_rng():
                    torch.manual_seed(self.seed)
                    networks[name] = SampleClassifier(1, len(self.labels.prompts), self.trunk)
                networks[name].attribute_head.requires_grad_(False)
            self.networks = nn.ModuleDict(networks)

    def setup(self, stage: str) -> None:
        """Find the debiased samples.

        Raises:
            ValueError: if a sample belongs to none of the prompts.
        """
        given, prompts = self.samples, self.labels.prompts
        self.generated = read_samples(Path(given)) if isinstance(given, str) else given
        if unknown := set(self.generated.prompts) - set(prompts):
            where = given if isinstance(given, str) else "samples"
            raise InvDiffError(
                f"{where} holds samples of {min(unknown)!r}, which is none of the {len(prompts)} "
                "prompts: rerun the samples stage, or name it in prompts.",
                "samples",
            )
        # Numbers that stand for the samples' prompts in batches.
        self._numbers = torch.tensor([prompts.index(text) for text in self.generated.prompts])

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return the summed cross-entropy of both networks, which share no weights."""
        source = generator(self.seed, "augmented classifier", self.global_step, self.global_rank)
        images, prompts = batch["images"], batch["prompt"]
        count = round(self.generated_share * len(images))
        chosen = torch.randint(len(self.generated), (count,), generator=source)
        drawn = self.generated.pixels(chosen.tolist(), images.shape[-1]).to(self.device)
        numbers = self._numbers[self.generated.prompt_ids[chosen]].to(self.device)
        mixed = {
            "real": (images, prompts),
            "augmented": (
                torch.cat([images[count:], drawn]),
                torch.cat([prompts[count:], numbers]),
            ),
        }
        assert self.networks is not None
        losses = {}
        for name, (pixels, targets) in mixed.items():
            logits = self.networks[name](augment(to_float(pixels), source))[1]
            losses[name] = functional.cross_entropy(logits, targets)
            self.log(f"train/loss_{name}", losses[name], prog_bar=True)
        loss = losses["real"] + losses["augmented"]
        check_finite(loss, self)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure AdamW with warm-up and cosine decay."""
        require_step_limit(self)
        parameters = [value for value in self.parameters() if value.requires_grad]
        return optimizer_with_schedule(self, parameters, self.learning_rate, self.weight_decay, 20)
