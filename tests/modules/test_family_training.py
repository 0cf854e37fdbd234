"""Training an adapter of another family: the same interrupted, and on several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny_families import FAMILIES as TINY
from tiny_families import PROMPTS, made
from torch import Tensor
from trainers import quiet_trainer

import invdiff_pl as inv

FAMILIES = [
    "flux",
    *(pytest.param(name, marks=pytest.mark.slow) for name in TINY if name not in ("sd", "flux")),
]


def trained(
    name: str, folder: Path, ranks: int = 1, steps: int = 3, ckpt_path: str | None = None
) -> dict[str, Tensor]:
    pipe = made(name)
    images = inv.PromptedImages(
        torch.linspace(0, 1, 16 * 3 * 32 * 32).view(16, 3, 32, 32), PROMPTS * 8
    )
    data = inv.LatentsInMemory.from_images(
        pipe, images, torch.arange(16) // 2 % 2, resolution=32, progress=False, batch_size=8
    )
    settings: dict[str, Any] = {"learning_rate": 0.01, "warmup_steps": 1, "resolution": 32}
    module = inv.InvariantAdapter(pipe, **settings)
    kept = _Kept(folder / "weights.pt")
    saving = ModelCheckpoint(folder / "checkpoints", filename="step", every_n_train_steps=1)
    trainer = quiet_trainer(
        folder,
        ranks,
        max_steps=3,
        callbacks=[kept, saving, _Stop(steps)],
        enable_checkpointing=True,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    found: dict[str, Tensor] = torch.load(folder / "weights.pt")
    return found


class _Kept(Callback):
    """Writes the adapter's weights, whichever process trains it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            weights = pl_module.trainable_parameters()
            torch.save({name: value.detach() for name, value in weights.items()}, self.file)


class _Stop(Callback):
    """Stops after some steps of a longer training."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


@pytest.mark.parametrize("name", FAMILIES)
def test_a_resumed_training_ends_at_the_same_weights(name: str, tmp_path: Path) -> None:
    whole = trained(name, tmp_path / "whole")
    first = trained(name, tmp_path / "parts", steps=1)
    checkpoint = str(tmp_path / "parts" / "checkpoints" / "step.ckpt")
    resumed = trained(name, tmp_path / "resumed", ckpt_path=checkpoint)
    assert any(not torch.equal(first[key], value) for key, value in whole.items())
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_end_at_the_weights_of_one(name: str, tmp_path: Path) -> None:
    one, two = (trained(name, tmp_path / str(ranks), ranks) for ranks in (1, 2))
    start = {
        n: p.detach() for n, p in inv.InvariantAdapter(made(name)).trainable_parameters().items()
    }
    moved = torch.cat([(one[key] - start[key]).flatten() for key in one])
    apart = torch.cat([(two[key] - one[key]).flatten() for key in one])
    assert float(apart.norm()) < 1e-3 * float(moved.norm())
