from pathlib import Path

import pytest

from invdiff_pl import InvariantAdapter, InvDiffError
from invdiff_pl.cli import lightning as cli
from invdiff_pl.cli.flags import data_flags, stage_flags
from invdiff_pl.cli.main import main
from invdiff_pl.data.custom import TableDataModule
from invdiff_pl.utils.processes import LOCKED

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def _arguments(stage: str, *flags: str) -> list[str]:
    files = ["custom.yaml", "base.yaml", "scales/mini.yaml", f"stages/{stage}.yaml"]
    command = "predict" if stage in ("environments", "samples") else "fit"
    return [command, *(f"--config={EXPERIMENTS / name}" for name in files), *flags]


def test_a_library_user_reads_the_argument_and_a_user_of_the_command_the_flag(capsys) -> None:
    with pytest.raises(ValueError, match=r"^adapter=loraa: there is no such adapter") as caught:
        InvariantAdapter("nowhere", adapter="loraa")
    assert isinstance(caught.value, InvDiffError)
    assert caught.value.arguments == ("adapter",)
    assert main(_arguments("adapter", "--model.adapter=loraa")) == 2
    assert capsys.readouterr().err == f"error: --model.{caught.value}\n"


@pytest.fixture(scope="module")
def adapter_stage() -> dict:
    return cli.settings(_arguments("adapter", "--experiment.run_dir=run"))


def test_arguments_have_the_flags_of_the_class_that_takes_them(adapter_stage) -> None:
    flags = stage_flags(adapter_stage)
    expected = {
        "adapter": "--model.adapter",  # also one of the scale's settings
        "lambda_": "--model.lambda_",
        "broken": "--data.broken",
        "batch_size": "--data.batch_size",
        "extractor": "--evaluation.extractor",
        "run_dir": "--experiment.run_dir",
        "size": "--scale.max_micro_batch",
        "compiled": "--scale.compile_denoiser",
        "samples": "--scale.calibration_samples",
        "trainer": "--trainer",
    }
    assert {name: flags[name] for name in expected} == expected


def test_a_stage_that_train_runs_is_told_of_by_its_name(adapter_stage, monkeypatch) -> None:
    monkeypatch.setenv(LOCKED, "1")
    flags = stage_flags(adapter_stage)
    assert flags["learning_rate"] == "--adapter.model.learning_rate"
    assert flags["trainer"] == "--adapter.trainer"
    assert flags["broken"] == "--data.broken"


def test_a_datamodule_has_the_flags_of_all_its_bases() -> None:
    flags = data_flags(TableDataModule)
    assert flags["val_share"] == "--data.val_share"
    assert flags["broken"] == "--data.broken"
    assert flags["train_without_bias"] == "--model.train_without_bias"


def test_what_a_stage_stumbles_over_when_it_runs_is_told_by_its_flag(
    tmp_path, capsys, tiny_backbone, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    flags = ("--experiment.data_root=pictures", f"--experiment.backbone={tiny_backbone}")
    assert main(_arguments("environments", *flags)) == 2
    error = capsys.readouterr().err
    assert "is named with --data.table=." in error
    assert error.count("\n") == 1


def test_the_drawing_of_pictures_names_its_own_flags(tmp_path, capsys) -> None:
    words = ["render", "--experiment", "waterbirds", "--run-dir", str(tmp_path / "run")]
    assert main([*words, "--size", "8"]) == 2
    told = "error: --size=8: pictures need at least 16 pixels per side.\n"
    assert capsys.readouterr().err == told


def test_a_datamodule_alone_names_its_flags_too() -> None:
    configs = [word for word in _arguments("adapter") if word.startswith("--config")][:-1]
    with pytest.raises(InvDiffError, match=r"^--data\.min_images_per_prompt=0: expected 1 or more"):
        cli.data_module([*configs, "--data.min_images_per_prompt=0"])
