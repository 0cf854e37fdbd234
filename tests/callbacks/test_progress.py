import re
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.demos.boring_classes import BoringModel, RandomDataset
from pytorch_lightning.loggers import TensorBoardLogger

from invdiff_pl.callbacks.progress import ProgressBar, ProgressLines, progress_callback
from invdiff_pl.utils import progress
from invdiff_pl.utils.progress import Lines


def test_the_bar_does_not_show_the_stages_name_as_a_version_number(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="classifier")
    trainer = pl.Trainer(logger=logger, accelerator="cpu")
    module = pl.LightningModule()
    assert RichProgressBar().get_metrics(trainer, module)["v_num"] == "fier"
    assert "v_num" not in ProgressBar().get_metrics(trainer, module)


@pytest.mark.parametrize(
    ("limit", "shown"), [("max_steps", "Training"), ("max_epochs", "Epoch 0/6")]
)
def test_training_that_is_counted_in_steps_has_no_number_of_epochs(limit: str, shown: str) -> None:
    settings: dict[str, Any] = {limit: 7}
    bar = ProgressBar()
    bar.setup(pl.Trainer(accelerator="cpu", logger=False, **settings), BoringModel(), "fit")
    assert bar._get_train_description(0).strip() == shown


class _Stage(BoringModel):
    stage = "adapter"


def test_lines_tell_of_training_and_of_prediction(tmp_path, monkeypatch) -> None:
    told: list[str] = []
    lines = Lines(every=0, soon=0, write=told.append)
    monkeypatch.setattr(progress, "_lines", lines)
    monkeypatch.setattr(progress, "shows_bars", lambda: False)
    callback = progress_callback()
    assert isinstance(callback, ProgressLines)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=3,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
        enable_progress_bar=False,
    )
    trainer.fit(_Stage())
    trainer.predict(_Stage(), torch.utils.data.DataLoader(RandomDataset(32, 2)))
    without_time = [re.sub(", about .* left", "", line) for line in told]
    assert without_time == [
        *(f"adapter: step {step} of 3" for step in (1, 2, 3)),
        *(f"adapter: batch {batch} of 2" for batch in (1, 2)),
    ]


def test_on_a_terminal_the_bar_stays(monkeypatch) -> None:
    monkeypatch.setattr("invdiff_pl.callbacks.progress.shows_bars", lambda: True)
    assert isinstance(progress_callback(), ProgressBar)
