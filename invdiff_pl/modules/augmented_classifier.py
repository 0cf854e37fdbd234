"""What debiased samples are good for: a classifier trained on them, too, in its worst group."""

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
from invdiff_pl.data.images import read_images, to_float
from invdiff_pl.data.samples import Sample, read_manifest
from invdiff_pl.metrics import wilson_interval
from invdiff_pl.metrics.classifier import SMALL, SampleClassifier, require_trunk
from invdiff_pl.modules.attribute_classifier import augment
from invdiff_pl.modules.common import (
    check_finite,
    data_module,
    optimizer_with_schedule,
    output_folder,
    require_step_limit,
)
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_file, write_json

NAMES = ("real", "augmented")
_BATCH = 256


class AugmentedClassifier(pl.LightningModule):
    """Trains two classifiers of the prompt, on real images alone and on real and debiased ones.

    Both start from the same weights and see equally many images in equally many steps; the second
    has a share of each batch replaced by samples at the highest invariant scale. Neither sees an
    attribute: labels serve the test only, which is accuracy by (prompt, attribute) group of the
    test split. Writes ``augmentation.json``.

    Args:
        output: folder of the result.
        samples: folder of the samples stage.
        generated_share: share of generated images in the second one's batches, in (0, 1).
        trunk: see :class:`~invdiff_pl.metrics.classifier.SampleClassifier`.
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW.
        seed: of weights, augmentation and the choice of samples.
    """

    def __init__(
        self,
        output: str,
        samples: str,
        generated_share: float = 0.5,
        trunk: str = SMALL,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.require_settings(self.hparams)
        self.output = output
        self.samples_folder = Path(samples)
        self.generated_share = generated_share
        self.trunk = trunk
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.seed = seed
        self.networks: nn.ModuleDict | None = None

    @staticmethod
    def require_settings(settings: Mapping[str, Any]) -> None:
        """Refuse settings before a network is built.

        Args:
            settings: all of the constructor's arguments.

        Raises:
            InvDiffError: naming the first that is wrong.
        """
        require_trunk(settings["trunk"])
        if not 0 < (share := settings["generated_share"]) < 1:
            raise InvDiffError(
                f"generated_share={share}: expected a share between 0 and 1.", "generated_share"
            )

    def configure_model(self) -> None:
        """Build two equal networks once the prompts are known."""
        if self.networks is None:
            count = len(data_module(self).prompts)
            networks = {}
            for name in NAMES:
                with torch.random.fork_rng():
                    torch.manual_seed(self.seed)
                    networks[name] = SampleClassifier(1, count, self.trunk)
                networks[name].attribute_head.requires_grad_(False)
            self.networks = nn.ModuleDict(networks)

    def setup(self, stage: str) -> None:
        """Find the debiased samples."""
        data = data_module(self)
        if data.attributes() is None:
            raise InvDiffError(f"{data.why_not_scored}, so there is no worst group to look at.")
        manifest = read_manifest(self.samples_folder)
        highest = max(sample.invariant_scale for sample in manifest)
        self.generated: list[Sample] = [s for s in manifest if s.invariant_scale == highest]
        unknown = {sample.prompt for sample in self.generated} - set(data.prompts)
        if unknown:
            raise InvDiffError(
                f"{self.samples_folder} holds samples of {min(unknown)!r}, which is no prompt of "
                f"{data.root}: rerun the samples stage."
            )

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of both networks; they share no weight, so the sum trains each alone."""
        source = generator(self.seed, "augmented classifier", self.global_step, self.global_rank)
        images, prompts = batch["images"], batch["prompt"]
        count = round(self.generated_share * len(images))
        chosen = torch.randint(len(self.generated), (count,), generator=source).tolist()
        files = [self.samples_folder / self.generated[number].file for number in chosen]
        drawn = read_images(files, images.shape[-1]).to(self.device)
        numbers = [self.generated[number].prompt_number for number in chosen]
        mixed = {
            "real": (images, prompts),
            "augmented": (
                torch.cat([images[count:], drawn]),
                torch.cat([prompts[count:], torch.tensor(numbers, device=self.device)]),
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
        """AdamW with warm-up and cosine."""
        require_step_limit(self)
        parameters = [value for value in self.parameters() if value.requires_grad]
        return optimizer_with_schedule(self, parameters, self.learning_rate, self.weight_decay, 20)

    def on_fit_end(self) -> None:
        """Test both networks on every rank's share of the test split, and write the figures."""
        assert self.networks is not None
        counts = {name: self._test(network) for name, network in self.networks.items()}
        if not self.trainer.is_global_zero:
            return
        data = data_module(self)
        found: dict[str, Any] = {
            name: group_figures(table, data.prompts, data.attribute_names)
            for name, table in counts.items()
        }
        found["generated_images"] = len(self.generated)
        found["generated_share"] = self.generated_share
        found["samples"] = digest_file(self.samples_folder / "metrics.json")
        write_json(output_folder(self.output) / "augmentation.json", found)
        for name in NAMES:
            print(
                f"{name}: worst group {100 * found[name]['worst_group']:.1f} % "
                f"({found[name]['worst_group_name']}), mean {100 * found[name]['mean']:.1f} %"
            )

    @torch.no_grad()
    def _test(self, network: nn.Module) -> Tensor:
        """Wrong and right answers by (prompt, attribute), int64 ``[P, K, 2]`` over all ranks."""
        data = data_module(self)
        prompts, attributes = data.labels("test")
        assert attributes is not None
        images, classes = data.images("test"), len(data.attribute_names)
        counts = torch.zeros(len(data.prompts) * classes * 2, dtype=torch.int64, device=self.device)
        rows = torch.arange(self.trainer.global_rank, len(prompts), self.trainer.world_size)
        network.eval()
        for chunk in rows.split(_BATCH):
            told = network(to_float(images.gather(chunk).to(self.device)))[1].argmax(1).cpu()
            cells = (prompts * classes + attributes)[chunk] * 2 + (told == prompts[chunk])
            counts += cells.bincount(minlength=len(counts)).to(self.device)
        summed: Tensor = self.trainer.strategy.reduce(counts, reduce_op="sum")
        return summed.cpu().reshape(len(data.prompts), classes, 2)


def group_figures(counts: Tensor, prompts: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy by group, JSON-ready.

    Args:
        counts: wrong and right answers, int64 ``[P, K, 2]``; groups without an image are left out.
        prompts: names of the rows.
        classes: names of the columns.
    """
    groups = {}
    for number, prompt in enumerate(prompts):
        for place, name in enumerate(classes):
            wrong, right = counts[number, place].tolist()
            if wrong + right:
                interval = wilson_interval(torch.tensor(right), torch.tensor(wrong + right))
                groups[f"{prompt}, {name}"] = {
                    "accuracy": right / (wrong + right),
                    "interval": interval.tolist(),
                    "images": wrong + right,
                }
    worst = min(groups, key=lambda group: groups[group]["accuracy"])
    return {
        "worst_group": groups[worst]["accuracy"],
        "worst_group_interval": groups[worst]["interval"],
        "worst_group_name": worst,
        "mean": sum(group["accuracy"] for group in groups.values()) / len(groups),
        "per_group": groups,
    }
