"""The same answer on one process and on two or three, over gloo."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from birds_data import birds_data
from safetensors.torch import load_file, save_file
from trainers import draw_samples, infer, quiet_trainer

from invdiff_pl.data.datasets import SequentialBatches
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.modules import Backbone, ConditionalSampler, InvariantAdapter
from invdiff_pl.utils.files import digest_file, digest_folder

STEPS = 3
# Seven pairs of two environments, which neither two nor three ranks can share out evenly.
BATCH = 14


class _KeepGradients(pl.Callback):
    """Writes the gradients of the last step, as the optimizer meets them."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == STEPS - 1 and trainer.is_global_zero:
            parameters = pl_module.trainable_parameters().items()
            save_file({name: p.grad.contiguous() for name, p in parameters}, self.file)


def _data(birds: Path, backbone: Path, cache: Path, **settings) -> WaterbirdsDataModule:
    return birds_data(birds, backbone, cache, **{"batch_size": BATCH, **settings})


@pytest.fixture(scope="module")
def inferred(birds, tiny_backbone, tmp_path_factory) -> dict[int, Path]:
    """The environments found by one, two and three ranks."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks-{ranks}") for ranks in (1, 2, 3)}
    for ranks, folder in folders.items():
        infer(tiny_backbone, folder, _data(birds, tiny_backbone, folders[1] / "cache"), ranks)
    return folders


@pytest.mark.parametrize("ranks", [2, 3])
def test_features_and_environments_are_equal_bit_for_bit(inferred, ranks: int) -> None:
    ours = load_file(inferred[ranks] / "environments.safetensors")
    alone = load_file(inferred[1] / "environments.safetensors")
    features = [np.load(inferred[n] / "features" / "features.npy") for n in (1, ranks)]
    assert np.array_equal(*features)
    assert ours.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_samples_are_the_same_files_byte_for_byte(
    birds, tiny_backbone, inferred, tmp_path, ranks: int
) -> None:
    for count in (1, ranks):
        module = ConditionalSampler(str(tiny_backbone), steps=2)
        data = _data(
            birds,
            tiny_backbone,
            inferred[1] / "cache",
            content="prompts",
            samples_per_prompt=3,
            batch_size=5,
        )
        draw_samples(module, data, tmp_path / f"{count}", count)
    assert digest_folder(tmp_path / f"{ranks}") == digest_folder(tmp_path / "1")
    assert len(list((tmp_path / "1").rglob("*.png"))) == 18


def test_ranks_for_which_there_is_no_batch_wait_for_the_others(
    birds, tiny_backbone, inferred, tmp_path
) -> None:
    for ranks in (1, 2):
        environments = tmp_path / f"environments-{ranks}"
        data = _data(birds, tiny_backbone, inferred[1] / "cache", batch_size=500)
        infer(tiny_backbone, environments, data, ranks)
        sampler = ConditionalSampler(str(tiny_backbone), steps=1)
        data = _data(
            birds,
            tiny_backbone,
            inferred[1] / "cache",
            content="prompts",
            samples_per_prompt=1,
            batch_size=500,
        )
        draw_samples(sampler, data, tmp_path / f"{ranks}", ranks)
    file = "environments.safetensors"
    assert digest_file(tmp_path / "environments-1" / file) == digest_file(
        tmp_path / "environments-2" / file
    )
    assert digest_folder(tmp_path / "1") == digest_folder(tmp_path / "2")


def _adapter(backbone: Path) -> InvariantAdapter:
    # An untrained backbone shows no bias.
    return InvariantAdapter(
        str(backbone), learning_rate=0.01, warmup_steps=1, train_without_bias=True
    )


def _backbone(backbone: Path) -> Backbone:
    return Backbone(str(backbone), learning_rate=1e-3, warmup_steps=1)


def _gradients(
    make: Callable[[Path], pl.LightningModule], birds, backbone, inferred, folder, ranks
) -> dict[str, torch.Tensor]:
    """Gradients of the third step, after two steps on the same number of ranks."""
    environments = str(inferred[1]) if make is _adapter else None
    data = _data(birds, backbone, inferred[1] / "cache", environments=environments)
    kept = _KeepGradients(folder / f"{ranks}.safetensors")
    trainer = quiet_trainer(folder, ranks, max_steps=STEPS, callbacks=[kept])
    trainer.fit(make(backbone), datamodule=data)
    return load_file(kept.file)


@pytest.mark.parametrize("make", [_adapter, _backbone])
def test_gradients_of_a_global_batch_do_not_depend_on_the_number_of_ranks(
    birds, tiny_backbone, inferred, tmp_path, make
) -> None:
    alone, *others = (
        _gradients(make, birds, tiny_backbone, inferred, tmp_path, ranks) for ranks in (1, 2, 3)
    )
    assert any(bool(value.any()) for value in alone.values())
    scale = max(float(value.abs().max()) for value in alone.values())
    for ours in others:
        for name, value in alone.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5 * scale)


def test_ranks_share_out_whole_batches() -> None:
    whole = [batch.rows.tolist() for batch in SequentialBatches(23, 5, 0, 1)]
    shares = [
        [batch.rows.tolist() for batch in SequentialBatches(23, 5, rank, 3)] for rank in range(3)
    ]
    assert sorted(batch for share in shares for batch in share) == whole
    assert shares[2] == [[10, 11, 12, 13, 14]]
    assert [batch.rows.tolist() for batch in SequentialBatches(5, 5, 1, 2)] == [[]]
