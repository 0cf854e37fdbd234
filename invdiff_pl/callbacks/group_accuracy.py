"""Two classifiers tested in each (prompt, attribute) group of the test split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from invdiff_pl.callbacks.data import data_module
from invdiff_pl.data.images import to_float
from invdiff_pl.metrics import wilson_interval
from invdiff_pl.modules.augmented_classifier import NAMES, AugmentedClassifier
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_file, write_json

_BATCH = 256


class GroupAccuracy(pl.Callback):
    """Tests the networks of an :class:`~invdiff_pl.modules.AugmentedClassifier` after training.

    Labels serve this test only. The figures are written to ``augmentation.json``.

    Args:
        output: folder to write to, created if missing.
    """

    changes_result = True

    def __init__(self, output: str) -> None:
        self.output = output

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reject a data set without labels.

        Raises:
            ValueError: if there are no labels.
        """
        data = data_module(trainer)
        if data.attributes() is None:
            raise InvDiffError(f"{data.why_not_scored}, so there is no worst group to look at.")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test both networks on every rank's share of the test split, and write the figures."""
        assert isinstance(pl_module, AugmentedClassifier)
        assert pl_module.networks is not None
        counts = {name: _test(trainer, network) for name, network in pl_module.networks.items()}
        if not trainer.is_global_zero:
            return
        data = data_module(trainer)
        found: dict[str, Any] = {
            name: group_figures(table, data.prompts, data.attribute_names)
            for name, table in counts.items()
        }
        found["generated_images"] = len(pl_module.generated)
        found["generated_share"] = pl_module.generated_share
        if isinstance(pl_module.samples, str):
            found["samples"] = digest_file(Path(pl_module.samples) / "metrics.json")
        write_json(Path(self.output) / "augmentation.json", found)
        for name in NAMES:
            print(
                f"{name}: worst group {100 * found[name]['worst_group']:.1f} % "
                f"({found[name]['worst_group_name']}), mean {100 * found[name]['mean']:.1f} %"
            )


@torch.no_grad()
def _test(trainer: pl.Trainer, network: nn.Module) -> Tensor:
    """Count wrong and right answers by (prompt, attribute), int64 ``[P, K, 2]``, over all ranks."""
    data, device = data_module(trainer), trainer.strategy.root_device
    prompts, attributes = data.labels("test")
    assert attributes is not None
    images, classes = data.images("test"), len(data.attribute_names)
    counts = torch.zeros(len(data.prompts) * classes * 2, dtype=torch.int64, device=device)
    rows = torch.arange(trainer.global_rank, len(prompts), trainer.world_size)
    network.eval()
    for chunk in rows.split(_BATCH):
        told = network(to_float(images.gather(chunk).to(device)))[1].argmax(1).cpu()
        cells = (prompts * classes + attributes)[chunk] * 2 + (told == prompts[chunk])
        counts += cells.bincount(minlength=len(counts)).to(device)
    summed: Tensor = trainer.strategy.reduce(counts, reduce_op="sum")
    return summed.cpu().reshape(len(data.prompts), classes, 2)


def group_figures(counts: Tensor, prompts: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Compute the accuracy of each group, JSON-ready.

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
