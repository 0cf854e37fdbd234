"""Contact sheets: what a person would look at to see what the environments are about."""

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from invdiff_pl.data.base import BiasedDataModule
from invdiff_pl.data.images import read_images
from invdiff_pl.utils.files import atomic_path
from invdiff_pl.utils.labels import prompt_label
from invdiff_pl.utils.sheets import contact_sheet
from invdiff_pl.utils.tensors import read_tensors

_MOST = 60  # characters of a prompt


class EnvironmentSheets(pl.Callback):
    """Writes the most typical images of each environment, prompt by prompt, once it is inferred.

    A sheet ``sheet-NN.png`` a prompt, one row an environment: the images whose scores are nearest
    to the middle of their environment's. Sheets and histograms of the scores go to TensorBoard too.

    Args:
        output: folder of the environment stage's result.
        tensorboard: folder of its events.
        columns: images in a row.
        most_prompts: the prompts with most images that get a sheet.
    """

    def __init__(
        self, output: str, tensorboard: str, columns: int = 10, most_prompts: int = 12
    ) -> None:
        self.output = Path(output)
        self.tensorboard = tensorboard
        self.columns = columns
        self.most_prompts = most_prompts

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the sheets."""
        if not trainer.is_global_zero:
            return
        data: BiasedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        file = self.output / "environments.safetensors"
        tensors = read_tensors(file, "rerun the environments stage", scores=1, assignments=1)
        scores, assignments = tensors["scores"], tensors["assignments"]
        rows = data.index.rows("train")
        prompt_ids = data.index.prompt_ids[rows]
        largest = prompt_ids.bincount().argsort(descending=True, stable=True)[: self.most_prompts]
        with SummaryWriter(self.tensorboard) as writer:
            for number, prompt in enumerate(largest.tolist()):
                here = prompt_ids == prompt
                strips = {}
                for group in range(int(assignments.max()) + 1):
                    members = (here & (assignments == group)).nonzero().squeeze(1)
                    typical = most_typical(scores[members], self.columns)
                    files = data.index.paths(rows[members[typical]])
                    images = read_images(files, data.resolution) if files else ()
                    strips[f"environment {group}: {len(members)}"] = images
                label = prompt_label(data.prompts[prompt], prompt, _MOST)
                sheet = contact_sheet(label, strips, self.columns)
                with atomic_path(self.output / f"sheet-{number:02d}.png") as partial:
                    sheet.save(partial, format="PNG")
                pixels = np.asarray(sheet)
                writer.add_image(f"sheets/{data.prompts[prompt]}", pixels, dataformats="HWC")
                writer.add_histogram(f"scores/{data.prompts[prompt]}", scores[here])


def most_typical(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` scores nearest to the median, nearest first."""
    if len(scores) == 0:
        return torch.zeros(0, dtype=torch.int64)
    return (scores - scores.median()).abs().argsort(stable=True)[:count]
