"""Writing what the inference of environments found, to disk and to TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.data.images import read_images
from invdiff_pl.environments.candidate import SHEETS, Pictures, most_frequent
from invdiff_pl.environments.discovery import SHOWN, Discovery
from invdiff_pl.environments.naming import WORDS
from invdiff_pl.environments.quality import environment_report
from invdiff_pl.metrics.clip import ClipEncoder
from invdiff_pl.modules.environment_inference import EnvironmentInference
from invdiff_pl.utils.errors import InvDiffError

_PROMPTS_TOLD = 20


class TrainImages:
    """The images of a DataModule's train split, read when they are needed.

    Args:
        data: the DataModule.
    """

    def __init__(self, data: BiasedDataModule) -> None:
        self._data, self._rows = data, data.index.rows("train")
        self.prompts: tuple[str, ...] = tuple(data.prompts)
        self.prompt_ids: Tensor = data.train_prompts()

    def pixels(self, rows: Sequence[int], resolution: int) -> Tensor:
        """Read the images of B rows, uint8 ``[B, 3, resolution, resolution]``."""
        return read_images(self._data.index.paths(self._rows[list(rows)]), resolution)


class SaveEnvironments(pl.Callback):
    """Writes candidates, their sheets and a page that compares them, once they are found.

    See :meth:`invdiff_pl.environments.discovery.Discovery.save` for the files. Labels, if a data
    set has any, are used only to score the environments.

    Args:
        output: folder to write to, created if missing.
        images: images that were searched, in the order of their rows; those of the train split of
            the trainer's DataModule if not given.
        tensorboard: folder of TensorBoard events, for sheets and histograms of conflict; neither is
            written if not given.
        clip: folder of a CLIP model that names the groups; they are not named if not given.
        words: words that groups may be named by; a short list of common ones if not given.
    """

    changes_result = True

    def __init__(
        self,
        output: str,
        images: Pictures | None = None,
        tensorboard: str | None = None,
        clip: str | None = None,
        words: Sequence[str] = WORDS,
    ) -> None:
        self.output, self.images, self.tensorboard = output, images, tensorboard
        self.clip, self.words = clip, words

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the candidates, print a summary, and write to TensorBoard."""
        assert isinstance(pl_module, EnvironmentInference)
        if not trainer.is_global_zero:
            return
        data = getattr(trainer, "datamodule", None)
        attributes = None
        images = self.images
        if isinstance(data, BiasedDataModule):
            images = images or TrainImages(data)
            attributes = data.labels("train")[1]
        if images is None:
            raise InvDiffError(
                "images=None: expected those of the loader's latents; pass them to "
                "SaveEnvironments.",
                "images",
            )
        found = Discovery(pl_module.found, images)
        if self.clip is not None:
            found = found.named(ClipEncoder(self.clip), self.words)
        facts: dict[str, Any] = {
            "features": pl_module.kind,
            "inference": pl_module.inference,
            "quality": _quality(found, attributes),
        }
        found.save(self.output, facts)
        told = found.facts() | facts
        print(summary(told), f"all candidates: {Path(self.output) / 'discover.html'}", sep="\n")
        if self.tensorboard is not None:
            _show(found, self.tensorboard)


def _quality(found: Discovery, attributes: Tensor | None) -> dict[str, Any]:
    """Return the sizes of the environments and, if there are labels, how well they match."""
    prompts = found.images.prompt_ids
    if len(found) == 0:
        alone = torch.ones((len(prompts), 1))
        return environment_report(torch.zeros(len(prompts)), alone, prompts, attributes)
    best = found[found.chosen or 0]
    return environment_report(best.conflict, best.environments, prompts, attributes)


def _show(found: Discovery, folder: str) -> None:
    """Write sheets of the candidates and histograms of their conflict to TensorBoard."""
    with SummaryWriter(folder) as writer:
        for number, candidate in enumerate(found[:SHOWN]):
            verdict = f"candidate {number}, {candidate.verdict}"
            for prompt in most_frequent(found.images, SHEETS):
                name = f"{verdict}/{found.images.prompts[prompt]}"
                pixels = np.asarray(candidate.sheet(prompt))
                writer.add_image(f"sheets, {name}", pixels, dataformats="HWC")
                conflict = candidate.conflict[found.images.prompt_ids == prompt]
                writer.add_histogram(f"conflict, {name}", conflict)


def summary(told: dict[str, Any]) -> str:
    """Summarise what the inference found, for the terminal."""
    names = {True: "bias found", False: "no bias found", None: "bias not tested"}
    tested = told["bias_found"] is not None  # else groups are hardly told apart
    lines = [f"{names[told['bias_found']]}: {told['reason']}"]
    entries = list(zip(told["prompts"], told["quality"]["per_prompt"], strict=True))
    for prompt, entry in entries[:_PROMPTS_TOLD]:
        sizes = " + ".join(map(str, entry["sizes"]))
        known = tested and "confidence" in entry
        sure = f", confidence {entry['confidence']:.2f}" if known else ""
        auc = "" if entry.get("auc") is None else f", AUC {entry['auc']:.4f}"
        lines.append(f"{' '.join(prompt.split())}: {sizes} images{sure}{auc}")
    if len(entries) > _PROMPTS_TOLD:
        lines.append(f"… and {len(entries) - _PROMPTS_TOLD} more prompts")
    if told["quality"].get("auc") is not None:
        lines.append(f"AUC for bias-conflicting images, all prompts: {told['quality']['auc']:.4f}")
    return "\n".join(lines)
