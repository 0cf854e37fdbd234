"""Several adapters on one frozen pass: each is trained exactly as it is alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import quiet_trainer

from invdiff_pl.callbacks import (
    ExponentialMovingAverage,
    HeldOutSelection,
    PerVariant,
    ScaleCalibration,
    StagePlan,
)
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import digest_folder, read_json
from invdiff_pl.modules import AdapterVariants, InvariantAdapter

STEPS = 4
SMALL = {"adapter": "small_unet", "adapter_settings": {"ratio": 0.5}}
# Of different penalties, rates, objectives and kinds.
VARIANTS: dict[str, dict[str, Any]] = {
    "lambda-0": {**SMALL, "lambda_": 0.0},
    "lambda-10.5": {**SMALL, "lambda_": 10.5, "learning_rate": 0.02, "weight_decay": 0.1},
    "copy": {"adapter": "unet_copy", "objective": "group_dro", "loss_weighting": "min_snr"},
}


@pytest.fixture(scope="module")
def place(birds: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches and an environments folder whose second environment is every fifth image."""
    folder = tmp_path_factory.mktemp("training")
    data = _data(birds, tiny_backbone, folder)
    data.prepare_data()
    assignments = (torch.arange(len(data.index.rows("train"))) % 5 == 0).long()
    (folder / "environments").mkdir()
    save_file({"assignments": assignments}, folder / "environments" / "environments.safetensors")
    (folder / "environments" / "environments.json").write_text(json.dumps({}))
    return folder


def _data(root: Path, backbone: Path, place: Path) -> WaterbirdsDataModule:
    return WaterbirdsDataModule(
        root=str(root),
        backbone=str(backbone),
        resolution=32,
        cache_dir=str(place / "cache"),
        environments=str(place / "environments"),
        held_out=0.2,
        batch_size=12,
    )


def _settings(backbone: Path, folder: Path, name: str) -> dict[str, Any]:
    common = {"backbone": str(backbone), "learning_rate": 0.01, "warmup_steps": 1}
    return {**common, "output": str(folder / name), **VARIANTS[name]}


def _together(backbone: Path, folder: Path, *names: str) -> AdapterVariants:
    chosen = names or tuple(VARIANTS)
    return AdapterVariants(str(folder), {n: _settings(backbone, folder, n) for n in chosen})


def _callbacks() -> list[pl.Callback]:
    """What chooses and rescales an adapter's weights."""
    return [
        ExponentialMovingAverage(0.5),
        HeldOutSelection(every_n_steps=2, images=12, bins=2),
        ScaleCalibration(samples=8, steps=1, images=24, least_recall=0.0),
    ]


def _fit(
    module: pl.LightningModule, data: WaterbirdsDataModule, folder: Path, **settings: Any
) -> pl.Trainer:
    resume = settings.pop("resume", None)
    trainer = quiet_trainer(folder, **{"max_steps": STEPS, **settings})
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


@pytest.mark.parametrize("parts", [1, 2])
def test_each_of_several_is_bit_for_bit_what_it_becomes_alone(
    parts, birds, tiny_backbone, place, tmp_path
) -> None:
    module = _together(tiny_backbone, tmp_path / "together")
    _fit(
        module,
        _data(birds, tiny_backbone, place),
        tmp_path,
        accumulate_grad_batches=parts,
        callbacks=[PerVariant(_callbacks())],
    )
    for name in VARIANTS:
        alone = InvariantAdapter(**_settings(tiny_backbone, tmp_path / "alone", name))
        start = {n: value.clone() for n, value in alone.trainable_parameters().items()}
        _fit(
            alone,
            _data(birds, tiny_backbone, place),
            tmp_path,
            accumulate_grad_batches=parts,
            callbacks=_callbacks(),
        )
        weights = _weights(tmp_path / "alone" / name)
        assert any(not torch.equal(weights[n], start[n]) for n in weights)
        # Weights, configuration, held-out risks and calibration, to the last byte.
        assert digest_folder(tmp_path / "alone" / name) == digest_folder(tmp_path / "together" / name)
