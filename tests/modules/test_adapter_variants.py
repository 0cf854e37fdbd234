"""Several adapters on one frozen pass: each is trained exactly as it is alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from birds_data import birds_data
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
from invdiff_pl.modules import AdapterVariants, InvariantAdapter
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_folder, read_json

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
    environments = str(place / "environments")
    return birds_data(root, backbone, place / "cache", environments=environments, held_out=0.2)


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


@pytest.mark.parametrize(
    ("parts", "precision"), [(1, "32-true"), (2, "32-true"), (2, "bf16-mixed")]
)
def test_each_of_several_is_bit_for_bit_what_it_becomes_alone(
    parts, precision, birds, tiny_backbone, place, tmp_path
) -> None:
    module = _together(tiny_backbone, tmp_path / "together")
    _fit(
        module,
        _data(birds, tiny_backbone, place),
        tmp_path,
        accumulate_grad_batches=parts,
        precision=precision,
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
            precision=precision,
            callbacks=_callbacks(),
        )
        weights = _weights(tmp_path / "alone" / name)
        assert any(not torch.equal(weights[n], start[n]) for n in weights)
        # Weights, configuration, held-out risks and calibration, to the last byte.
        assert digest_folder(tmp_path / "alone" / name) == digest_folder(
            tmp_path / "together" / name
        )


def test_the_frozen_denoiser_is_asked_once_a_step_for_all(
    birds, tiny_backbone, place, tmp_path
) -> None:
    module = _together(tiny_backbone, tmp_path)
    asked: list[int] = []
    module.first.adapter.unet.register_forward_hook(lambda *_: asked.append(1))
    _fit(module, _data(birds, tiny_backbone, place), tmp_path)
    assert len(asked) == STEPS
    for variant in module.members():
        assert variant.adapter.unet is module.first.adapter.unet
        assert variant.pipeline.vae is module.pipeline.vae


def test_checkpoints_hold_what_is_trained_and_a_resumed_run_ends_as_the_undisturbed_one(
    birds, tiny_backbone, place, tmp_path
) -> None:
    names = ("lambda-10.5", "copy")
    for folder, resume in (("whole", None), ("resumed", tmp_path / "whole" / "step=2.ckpt")):
        module = _together(tiny_backbone, tmp_path / folder, *names)
        checkpoints = ModelCheckpoint(
            tmp_path / folder, filename="{step}", every_n_train_steps=2, save_top_k=-1
        )
        _fit(
            module,
            _data(birds, tiny_backbone, place),
            tmp_path,
            enable_checkpointing=True,
            callbacks=[PerVariant(_callbacks()), checkpoints],
            resume=resume,
        )
    state = torch.load(tmp_path / "whole" / "step=2.ckpt", weights_only=True)["state_dict"]
    trained = {name: value for name, value in state.items() if ".rule." not in name}
    sizes = [variant.adapter.size() for variant in module.members()]
    assert sum(value.numel() for value in trained.values()) == sum(sizes)
    assert len(state) > len(trained)  # what group_dro remembers
    for name in names:
        folders = [tmp_path / folder / name for folder in ("whole", "resumed")]
        assert digest_folder(folders[0]) == digest_folder(folders[1])


def test_each_variant_logs_as_a_run_of_its_own(birds, tiny_backbone, place, tmp_path) -> None:
    module = _together(tiny_backbone, tmp_path, "lambda-0", "lambda-10.5")
    logger = pl.loggers.TensorBoardLogger(tmp_path / "together", name="", version="")
    selection = HeldOutSelection(every_n_steps=2, images=12, bins=2)
    _fit(
        module,
        _data(birds, tiny_backbone, place),
        tmp_path,
        logger=logger,
        log_every_n_steps=2,
        callbacks=[PerVariant([selection], logs=str(tmp_path / "runs"))],
    )
    for name in module.names:
        events = EventAccumulator(str(tmp_path / "runs" / name / "tensorboard" / "adapter"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/risk/environment_1")] == [1, 3]
        told = [event.value for event in events.Scalars("heldout/objective")]
        held = read_json(tmp_path / name / "heldout.json")["selection"]["candidates"]
        assert told == pytest.approx([candidate["value"] for candidate in held])


def test_the_plan_counts_every_variants_weights_and_activations(
    birds, tiny_backbone, place, tmp_path
) -> None:
    plans = []
    for names in (("lambda-0",), ("lambda-0", "lambda-10.5")):
        plan = StagePlan()
        module = _together(tiny_backbone, tmp_path, *names)
        _fit(module, _data(birds, tiny_backbone, place), tmp_path, max_steps=1, callbacks=[plan])
        assert plan.plan is not None
        plans.append(plan.plan)
    one, two = plans
    assert two.weights_trained == 2 * one.weights_trained > 0
    assert two.weights_frozen == one.weights_frozen
    assert one.activations < two.activations < 2.1 * one.activations


def test_where_no_bias_was_found_every_variant_stays_a_no_op(
    birds, tiny_backbone, place, tmp_path, capsys
) -> None:
    other = tmp_path / "unbiased"
    shutil.copytree(place, other)
    (other / "environments" / "environments.json").write_text(json.dumps({"bias_found": False}))
    module = _together(tiny_backbone, tmp_path, "lambda-0", "lambda-10.5")
    callbacks = [PerVariant(_callbacks())]
    trainer = _fit(module, _data(birds, tiny_backbone, other), tmp_path, callbacks=callbacks)
    assert trainer.global_step == 0
    assert capsys.readouterr().out.count("found no bias") == 1
    for name in module.names:
        assert read_json(tmp_path / name / "adapter" / "adapter.json")["trained"] is False
        assert not _weights(tmp_path / name)["conv_out.weight"].any()


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_adapters_that_change_the_frozen_pass_are_refused(kind, tiny_backbone, tmp_path) -> None:
    settings = {"backbone": str(tiny_backbone), "output": str(tmp_path), "adapter": kind}
    settings["adapter_settings"] = {"ratio": 0.2} if kind == "bottleneck" else {}
    with pytest.raises(InvDiffError, match=f"{kind} changes .* own pass.*make compare"):
        AdapterVariants(str(tmp_path), {"a": settings})


def test_what_variants_must_share_is_named(birds, tiny_backbone, place, tmp_path) -> None:
    names = ("lambda-0", "copy")
    settings = {name: _settings(tiny_backbone, tmp_path, name) for name in names}
    settings["copy"]["seed"] = 1
    with pytest.raises(InvDiffError, match=r"lambda-0 and copy differ in --model\.seed"):
        AdapterVariants(str(tmp_path), settings)
    with pytest.raises(InvDiffError, match="at least one"):
        AdapterVariants(str(tmp_path), {})
    module = _together(tiny_backbone, tmp_path, "lambda-0")
    with pytest.raises(InvDiffError, match="gradient_clip_algorithm=value"):
        _fit(module, _data(birds, tiny_backbone, place), tmp_path, gradient_clip_val=1.0)


@pytest.mark.slow
def test_two_ranks_train_what_one_does(birds, tiny_backbone, place, tmp_path) -> None:
    names = ("lambda-10.5", "copy")
    for ranks in (1, 2):
        module = _together(tiny_backbone, tmp_path / str(ranks), *names)
        _fit(
            module,
            _data(birds, tiny_backbone, place),
            tmp_path,
            max_steps=2,
            accumulate_grad_batches=ranks,
            callbacks=[PerVariant(_callbacks()[:2])],
            ranks=ranks,
        )
    for name in names:
        one, two = (_weights(tmp_path / str(ranks) / name) for ranks in (1, 2))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
