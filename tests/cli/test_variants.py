"""Variants of a run: trained in one stage, finished as runs of their own. No stage is started."""

import shutil
from pathlib import Path

import pytest

from invdiff_pl.cli import variants
from invdiff_pl.cli.lightning import settings
from invdiff_pl.cli.main import main
from invdiff_pl.utils.files import read_json
from invdiff_pl.workflow import run as runner
from invdiff_pl.workflow.due import begin, finish, is_current
from invdiff_pl.workflow.experiment import Experiment
from invdiff_pl.workflow.run import experiment_of
from invdiff_pl.workflow.stages import STAGES, Stage

REPOSITORY = Path(__file__).parents[2]
RUN = ["--experiment", "waterbirds", "--backbone", "pipeline", "--scale.adapter_steps", "7"]
SMALL = "--model.adapter=small_unet"


@pytest.fixture
def ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Path
) -> list[tuple[str, str]]:
    """A finished run in the folder ``run``; what is run after it is put into the list."""
    shutil.copytree(REPOSITORY / "experiments", tmp_path / "experiments")
    shutil.copytree(tiny_backbone, tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    stages: list[tuple[str, str]] = []

    def write(experiment: Experiment, stage: Stage, *unused: object) -> None:
        stages.append((str(experiment.run_dir), stage.name))
        begin(experiment, stage)
        folder = experiment.folder(stage)
        (folder / f"{stage.name}.txt").write_text(stage.name)
        (folder / "report.md").write_text("")
        if stage.name == "data":
            (folder / "images").mkdir()
            (folder / "images" / "one.png").write_text("")
        if str(experiment.run_dir).endswith("together"):
            model = settings(experiment.arguments(stage))["model"]
            for name, own in model["init_args"]["variants"].items():
                assert Path(own["output"]) == folder / name
                (folder / name / "adapter").mkdir(parents=True)
                (folder / name / "adapter" / "weights.txt").write_text(str(own["lambda_"]))
        finish(experiment, stage, {"seconds": 5.0})

    for module in (runner, variants):
        monkeypatch.setattr(module, "run_stage", write)
    monkeypatch.setattr(runner, "_check_arguments", lambda *_: None)
    monkeypatch.setattr(variants, "compare", print)
    assert main(["train", *RUN, "--run-dir", "run"]) == 0
    stages.clear()
    return stages


def _call(*words: str) -> int:
    return main(["variants", "--run-dir", "run", SMALL, *words])


def test_variants_become_runs_with_the_runs_environments_that_only_lack_samples_and_report(
    ran, capsys
) -> None:
    assert _call("--lambdas", "0", "10.5") == 0
    together, first, second = (f"run/variants/{n}" for n in ("together", "lambda-0", "lambda-10.5"))
    assert ran == [
        (together, "adapter"),
        *((run, stage) for run in (first, second) for stage in ("samples", "report")),
    ]
    for run, value in ((first, "0.0"), (second, "10.5")):
        assert Path(run, "adapter", "adapter", "weights.txt").read_text() == value
        for name in ("classifier", "environments"):
            assert Path(run, name, f"{name}.txt").read_text() == name
        record = read_json(Path(run, "adapter", "stage.json"))
        assert record["trained_with"] == ["lambda-0", "lambda-10.5"]
        assert record["replay"].endswith(run)
        assert record["seconds"] == 5.0
        assert main(["verify", run]) == 0
    assert capsys.readouterr().out.count(f"{[first, second]}") == 1  # compared


def test_a_variant_is_current_for_the_command_that_would_have_trained_it_alone(ran, capsys) -> None:
    assert _call("--lambdas", "0", "1") == 0
    start = "python -m invdiff_pl train "
    lines = [n for n in capsys.readouterr().out.splitlines() if n.startswith(start)]
    words = lines[1].removeprefix(start).split()
    assert "--model.lambda_=1" in words
    assert is_current(experiment_of("train", words), STAGES["adapter"])
    other = [*words, "--model.lambda_=2"]
    assert not is_current(experiment_of("train", other), STAGES["adapter"])


def test_only_variants_that_are_not_there_yet_are_trained(ran) -> None:
    assert _call("--lambdas", "0", "1") == 0
    ran.clear()
    assert _call("--lambdas", "0", "1") == 0
    assert ran == []
    wide = '--variant=wide --model.adapter_settings.ratio=0.3 "--model.objective=group_dro"'
    assert _call("--lambdas", "0", "1", wide) == 0
    assert [run for run, _ in ran] == ["run/variants/together", *["run/variants/wide"] * 2]
    record = read_json(Path("run/variants/wide/adapter/stage.json"))
    assert record["trained_with"] == ["wide"]


def test_the_stage_that_trains_all_has_the_runs_settings_and_callbacks_for_each(ran) -> None:
    words = ["--scale.look_every=3", "--trainer.max_steps=9", "--adapter.data.held_out=0.2"]
    assert _call("--lambdas", "0", "1", *words) == 0
    record = read_json(Path("run/variants/together/adapter/stage.json"))
    assert record["overrides"] == ["--trainer.max_steps=9", "--data.held_out=0.2"]
    *whole, each = record["config"]["trainer"]["callbacks"]
    assert each["class_path"].endswith("PerVariant")
    assert each["init_args"]["logs"] == "run/variants"
    inner = [callback["class_path"].split(".")[-1] for callback in each["init_args"]["callbacks"]]
    assert inner[:3] == ["ExponentialMovingAverage", "HeldOutSelection", "ScaleCalibration"]
    assert each["init_args"]["callbacks"][1]["init_args"]["every_n_steps"] == 3
    outer = [callback["class_path"].split(".")[-1] for callback in whole]
    assert outer == ["LocalBatch", "StagePlan", "DenoiserForm", "ModelCheckpoint"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lambdas", "0", "--model.adapter=lora"], "lora changes the frozen network's own pass"),
        ([], "give --lambdas"),
        (["--lambdas", "0", "0"], "two of the name lambda-0"),
        (["--lambdas", "much"], "lambda_"),
        (["--variant", "together"], "no name for a folder"),
        (["--variant", "../up --model.lambda_=1"], "no name for a folder"),
        (["--variant", "a --data.seed=1"], "variants differ in --model"),
        (["--lambdas", "0", "--variant", "a --model.seed=1"], "differ in --model.seed"),
        (["--lambdas", "0", "--environments.model.groups=3"], "run/environments is not there, or"),
    ],
)
def test_what_cannot_be_is_told_in_one_line_and_nothing_runs(words, told, ran, capsys) -> None:
    assert _call(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error
    assert ran == []


def test_a_folder_without_a_run_is_told(ran, capsys) -> None:
    assert main(["variants", "--run-dir", "elsewhere", "--lambdas", "1"]) == 2
    assert "elsewhere/run.json is missing" in capsys.readouterr().err
