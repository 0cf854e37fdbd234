"""What is refused, in one line, before any stage runs."""

from pathlib import Path

import pytest

from invdiff_pl.cli.experiment import run_experiment
from invdiff_pl.cli.main import main
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.workflow import run as runner


def test_a_flag_of_no_stage_is_refused_in_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--experiment", "waterbirds", "--modell.lambda_=1"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--modell.lambda_=1" in message


def test_a_mistyped_key_is_refused_before_any_stage_runs(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_stage", lambda *_: pytest.fail("a stage ran"))
    words = ["train", "--experiment", "waterbirds", "--backbone", "pipeline"]
    assert main([*words, "--model.lamda_=1"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "lamda_" in message


@pytest.mark.parametrize("command", ["train", "augment", "backbone"])
def test_a_backbone_that_cannot_be_used_is_refused_before_any_stage_runs(
    command: str,
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "run_stage", lambda *_: pytest.fail("a stage ran"))
    words = [command, "--experiment", "waterbirds", "--backbone"]
    index = workspace / "pipeline" / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"KolorsPipeline"'))
    for backbone, told in (
        ("pipeline", "its class is KolorsPipeline"),
        ("/nowhere", "does not exist"),
    ):
        assert main([*words, backbone]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert told in message


@pytest.mark.parametrize(
    ("flag", "stage"),
    [
        ("--model.adapter=loraa", "adapter"),
        ("--environments.model.inference=x", "environments"),
        ("--evaluation.extractor=x", "classifier"),
        ("--environments.model.settings.alpha=0.001", "environments"),
        ("--environments.model.features=none.npy", "environments"),
        ("--adapter.candidate=x", "adapter"),
        ("--data.latent_device=x", "classifier"),
    ],
)
def test_a_wrong_name_or_value_is_refused_before_any_stage_runs(
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    stage: str,
) -> None:
    monkeypatch.setattr(runner, "run_stage", lambda *_: pytest.fail("a stage ran"))
    words = ["train", "--experiment", "waterbirds", "--backbone", "pipeline"]
    assert main([*words, flag]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: stage {stage}: --")
    assert message.count("\n") == 1
    assert not Path("runs").exists()


def test_a_wrong_name_in_a_file_is_refused_before_any_stage_runs(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_stage", lambda *_: pytest.fail("a stage ran"))
    file = workspace / "experiments" / "stages" / "environments.yaml"
    wrong = "init_args:\n    inference: mixtur\n"
    file.write_text(file.read_text().replace("init_args:\n", wrong, 1))
    assert main(["train", "--experiment", "waterbirds", "--backbone", "pipeline"]) == 2
    message = capsys.readouterr().err
    assert "stage environments: --model.inference=mixtur: expected one of mixture" in message


def test_a_missing_data_folder_is_told_in_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--experiment", "waterbirds", "--backbone", "pipeline"]
    assert main([*words, "--data", "nowhere"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "nowhere" in message


def test_unknown_experiments_and_scales_list_the_known_ones(workspace: Path) -> None:
    with pytest.raises(InvDiffError, match="waterbirds"):
        run_experiment("train", ["--experiment", "waterbrids"])
    with pytest.raises(InvDiffError, match="mini"):
        run_experiment("train", ["--experiment", "waterbirds", "--scale", "huge"])
