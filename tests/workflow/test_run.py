"""Which stages run, with which arguments; no stage is started here."""

import json
import os
import shutil
from pathlib import Path

import pytest

from invdiff_pl.cli.experiment import experiment_of
from invdiff_pl.cli.main import main
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.processes import Ended
from invdiff_pl.workflow import run as runner
from invdiff_pl.workflow.due import begin, fingerprint, finish, is_current
from invdiff_pl.workflow.experiment import Experiment
from invdiff_pl.workflow.records import refresh
from invdiff_pl.workflow.stages import PLANS, STAGES, Stage

REPOSITORY = Path(__file__).parents[2]


def _experiment(*arguments: str, command: str = "train") -> Experiment:
    words = ["--experiment", "waterbirds", "--backbone", "pipeline", *arguments]
    return experiment_of(command, words)


def _stale(before: Experiment, after: Experiment) -> set[str]:
    """Stages of the train plan whose fingerprint differs."""
    return {
        name
        for name in PLANS["train"]
        if fingerprint(before, STAGES[name]) != fingerprint(after, STAGES[name])
    }


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("--model.lambda_=10", {"adapter", "samples", "report"}),
        ("--trainer.max_steps=5", {"adapter", "samples", "report"}),
        ("--scale.adapter_steps=5", {"adapter", "samples", "report"}),
        ("--scale.sampling_steps=5", {"samples", "report"}),
        ("--scale.latent_device=memory", set()),
        ("--scale.max_micro_batch=8", set()),
        ("--scale.gradient_checkpointing=true", set()),
        ("--scale.compile_denoiser=true", set()),
        ("--scale.channels_last=true", set()),
        ("--scale.scoring_batch=8", set()),
        ("--scale.sampling_batch=8", set()),
        ("--scale.guidance_scale=3", {"samples", "report"}),
        ("--scale.adapter_settings.rank=3", {"adapter", "samples", "report"}),
        ("--samples.model.steps=5", {"samples", "report"}),
        ("--environments.model.levels=[0.5]", {"environments", "adapter", "samples", "report"}),
        ("--adapter.candidate=1", {"adapter", "samples", "report"}),
        ("--classifier.model.learning_rate=0.1", {"classifier", "samples", "report"}),
        ("--evaluation.resolution=64", {"samples", "report"}),
        ("--render.correlation=0.7", set(PLANS["train"])),
        ("--seed_everything=1", set(PLANS["train"]) - {"data"}),
    ],
)
def test_a_changed_setting_makes_only_the_stages_that_depend_on_it_due(
    workspace: Path, override: str, stale: set[str]
) -> None:
    assert _stale(_experiment(), _experiment(override)) == stale


def test_an_empty_group_of_settings_takes_the_place_of_a_full_one(workspace: Path) -> None:
    flags = ["--scale.adapter_settings.rank=3", "--scale.adapter_settings={}"]
    adapter = STAGES["adapter"]
    for given, expected in ((flags, {}), (flags[::-1], {"rank": 3})):
        config = _experiment(*given).config(adapter)
        assert config["model"]["init_args"]["adapter_settings"] == expected


@pytest.mark.parametrize("scale", ["mini", "sd14", "sd14-reference"])
@pytest.mark.parametrize("name", ["waterbirds", "celeba", "fairface", "custom"])
def test_every_stage_of_every_experiment_has_settings_at_every_scale(
    name: str, scale: str, workspace: Path
) -> None:
    experiment = _experiment("--experiment", name, "--scale", scale, "--data", "somewhere")
    for stage in experiment.plan("train"):
        config = experiment.config(stage)
        assert config["experiment"]["name"] == name
        assert config["scale"]["samples_per_prompt"] > 0


def test_another_backbone_leaves_data_and_classifier_current(workspace: Path) -> None:
    before = _experiment()
    marks = {name: fingerprint(before, STAGES[name]) for name in PLANS["train"]}
    config = workspace / "pipeline" / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    current = {n for n in PLANS["train"] if fingerprint(before, STAGES[n]) == marks[n]}
    assert current == {"data", "classifier"}


def test_overrides_reach_the_stage_they_name(workspace: Path) -> None:
    experiment = _experiment(
        "--model.lambda_",
        "10",
        "--environments.model.block=x",
        "--adapter.candidate=0,1",
        "--data.seed=4",
    )
    arguments = {name: experiment.arguments(STAGES[name]) for name in PLANS["train"]}
    assert [n for n in arguments if "--model.lambda_=10" in arguments[n]] == ["adapter"]
    assert [n for n in arguments if "--model.block=x" in arguments[n]] == ["environments"]
    assert [n for n in arguments if "--data.candidate=0,1" in arguments[n]] == ["adapter"]
    having = {name for name in arguments if "--data.seed=4" in arguments[name]}
    assert having == {"classifier", "environments", "adapter", "samples"}


def test_settings_are_looked_up_in_the_working_folder_and_then_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = Path("experiments")
    for name in ("mine.yaml", "stages/adapter.yaml"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        source = "waterbirds.yaml" if name == "mine.yaml" else name
        shutil.copyfile(REPOSITORY / "experiments" / source, own / name)
    experiment = _experiment("--experiment", "mine")
    packaged = REPOSITORY / "experiments"
    expected = [own / "mine.yaml", packaged / "base.yaml", packaged / "scales" / "mini.yaml"]
    assert list(experiment.files) == expected
    assert experiment.stage_files(STAGES["adapter"])[-1] == own / "stages" / "adapter.yaml"
    assert experiment.stage_files(STAGES["samples"])[-1] == packaged / "stages" / "samples.yaml"
    with pytest.raises(InvDiffError) as refused:
        _experiment("--experiment", "nobody")
    assert str(refused.value) == (
        f"--experiment: there is no nobody.yaml in experiments or {packaged}; expected one of: "
        "celeba, custom, fairface, mine, prompts, waterbirds."
    )


def test_a_stage_is_current_once_finished_and_no_longer_when_its_input_changes(
    workspace: Path,
) -> None:
    experiment, stage = _experiment(), STAGES["classifier"]
    assert not is_current(experiment, stage)
    begin(experiment, stage)
    assert not is_current(experiment, stage)
    finish(experiment, stage, {"seconds": 1.0})
    assert is_current(experiment, stage)
    assert not is_current(_experiment("--render.seed=2"), stage)


def test_an_interrupted_stage_goes_on_only_with_the_same_settings(workspace: Path) -> None:
    experiment, stage = _experiment(), STAGES["adapter"]
    assert not begin(experiment, stage)
    partial = experiment.folder(stage) / "checkpoints" / "last.ckpt"
    partial.parent.mkdir()
    partial.write_text("half done")
    assert begin(experiment, stage)
    assert partial.exists()
    assert not begin(_experiment("--model.lambda_=10"), stage)
    assert not partial.exists()


def test_records_hold_settings_and_fingerprint(workspace: Path) -> None:
    experiment, stage = _experiment("--model.lambda_=10"), STAGES["adapter"]
    begin(experiment, stage)
    finish(experiment, stage, {"seconds": 1.0})
    record = json.loads((experiment.folder(stage) / "stage.json").read_text())
    assert record["overrides"] == ["--model.lambda_=10"]
    assert record["config"]["trainer"]["max_steps"] == 400


def test_a_new_backbone_fine_tunes_the_given_pipeline(workspace: Path) -> None:
    given = _experiment(command="backbone")
    assert "autoencoder" not in [stage.name for stage in given.plan("backbone")]
    assert given.config(STAGES["backbone"])["model"]["init_args"]["backbone"] == "pipeline"
    mark = fingerprint(given, STAGES["backbone"])
    config = workspace / "pipeline" / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert fingerprint(given, STAGES["backbone"]) != mark


def test_a_new_backbone_without_one_given_starts_from_its_own_autoencoder(workspace: Path) -> None:
    own = experiment_of("backbone", ["--experiment", "waterbirds"])
    assert "autoencoder" in [stage.name for stage in own.plan("backbone")]
    start = own.config(STAGES["backbone"])["model"]["init_args"]["backbone"]
    assert start == "runs/waterbirds/mini/autoencoder/pipeline"


def test_a_new_backbone_is_of_the_family_that_is_named(workspace: Path) -> None:
    given = ["--experiment", "waterbirds", "--family", "sana"]
    model = experiment_of("backbone", given).config(STAGES["autoencoder"])["model"]["init_args"]
    assert model["architecture"] == {"family": "sana"}
    own = experiment_of("backbone", given[:2]).config(STAGES["autoencoder"])["model"]["init_args"]
    assert own["architecture"] == {"family": "sd"}
    with pytest.raises(InvDiffError, match="--family=flux: expected one of sd, sana"):
        experiment_of("backbone", [*given[:3], "flux"])
    for command, more in (("train", []), ("backbone", ["--backbone", "pipeline"])):
        with pytest.raises(InvDiffError, match="--family=sana: expected only with `backbone`"):
            experiment_of(command, [*given, *more])


def test_devices_and_nodes_reach_every_stage_but_the_classifier(workspace: Path) -> None:
    experiment = _experiment("--devices", "4", "--num-nodes", "2", "--launcher", "srun")
    for name in ("classifier", "environments", "adapter", "samples"):
        given = [w for w in experiment.arguments(STAGES[name]) if "devices" in w or "nodes" in w]
        alone = name == "classifier"
        assert given == (
            ["--trainer.devices=1", "--trainer.num_nodes=1"]
            if alone
            else ["--trainer.devices=4", "--trainer.num_nodes=2"]
        )
    assert not _stale(_experiment(), experiment)


def test_several_nodes_need_a_launcher(workspace: Path) -> None:
    with pytest.raises(InvDiffError, match="--launcher=srun"):
        _experiment("--num-nodes", "2")


@pytest.mark.parametrize("name", ["data", "classifier", "adapter"])
def test_the_launcher_starts_what_runs_on_all_devices(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    commands: list[tuple[list[str], bool]] = []

    def call(command: list[str], lock: int, *, tied: bool) -> Ended:
        commands.append((command, tied))
        return Ended(0)

    monkeypatch.setattr(runner.processes, "call", call)
    runner.run_stage(_experiment(), STAGES[name], ["srun", "--x"])
    ((command, tied),) = commands
    assert (command[:2] == ["srun", "--x"]) is (name == "adapter")
    assert tied is (name != "adapter")


def test_the_newest_checkpoint_is_gone_on_from(workspace: Path) -> None:
    experiment, stage = _experiment(), STAGES["adapter"]
    assert not begin(experiment, stage)
    folder = experiment.folder(stage)
    assert runner._latest_checkpoint(folder) is None
    (folder / "checkpoints").mkdir()
    for age, name in enumerate(["hpc_ckpt_1.ckpt", "checkpoints/last.ckpt", "hpc_ckpt_2.ckpt"]):
        (folder / name).touch()
        os.utime(folder / name, (age, age))
        assert runner._latest_checkpoint(folder) == folder / name


def _wrote(experiment: Experiment, stage: Stage, *unused: object) -> None:
    """In place of a stage: a file of its name."""
    begin(experiment, stage)
    (experiment.folder(stage) / f"{stage.name}.safetensors").write_text(stage.name)
    (experiment.folder(stage) / "report.md").write_text("")
    finish(experiment, stage, {"seconds": 1.0})


def test_where_there_are_no_experiments_the_packaged_ones_are_run_kept_and_current(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("experiments")
    monkeypatch.setattr(runner, "run_stage", _wrote)
    words = ["train", "--experiment", "waterbirds", "--backbone", "pipeline", "--run-dir", "run"]
    for current in (0, 6):
        assert main(words) == 0
        assert capsys.readouterr().out.count("up to date") == current
        kept = Path("run/experiments/stages/adapter.yaml")
        packaged = REPOSITORY / "experiments" / "stages" / "adapter.yaml"
        assert kept.read_text() == packaged.read_text()


def test_a_run_keeps_its_command_and_its_files_and_can_be_replayed_from_them(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run_stage", _wrote)
    monkeypatch.setattr("invdiff_pl.cli.experiment.check_arguments", lambda *_: None)
    words = ["train", "--experiment", "waterbirds", "--backbone", "pipeline", "--run-dir", "run"]
    assert main([*words, "--scale.adapter_steps", "7"]) == 0
    shutil.rmtree("experiments")  # what was kept is enough
    capsys.readouterr()
    assert main(["replay", "run", "--print"]) == 0
    assert capsys.readouterr().out == (
        "python -m invdiff_pl train --experiment waterbirds --scale mini --backbone pipeline "
        "--scale.adapter_steps=7 --experiments run/experiments --run-dir run-replay\n"
    )
    assert main(["replay", "run"]) == 0
    assert "5 files are the same byte for byte, 0 differ" in capsys.readouterr().out
    record = json.loads(Path("run-replay/adapter/stage.json").read_text())
    assert record["config"]["trainer"]["max_steps"] == 7
    path = Path("run-replay/samples/samples.safetensors")
    path.write_text("other")
    refresh(path.parent)
    assert main(["replay", "run"]) == 1
    assert "differs: samples/samples.safetensors" in capsys.readouterr().out


def test_a_stage_that_fails_is_not_recorded(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.processes, "call", lambda command, lock, tied: Ended(143))
    with pytest.raises(InvDiffError, match="stage adapter failed"):
        runner.run_stage(_experiment(), STAGES["adapter"])
    assert not is_current(_experiment(), STAGES["adapter"])


def test_help_lists_the_commands_without_loading_torch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("train", "backbone", "fit", "predict", "render", "report"):
        assert command in text


def test_worst_group_accuracy_is_an_extra_that_makes_only_the_report_due(workspace: Path) -> None:
    names = [stage.name for stage in _experiment(command="augment").plan("augment")]
    assert names[-2:] == ["augmentation", "report"]
    assert "augmentation" not in PLANS["train"]
    experiment = _experiment()
    before = {name: fingerprint(experiment, STAGES[name]) for name in PLANS["train"]}
    extra = experiment.folder(STAGES["augmentation"]) / "augmentation.json"
    extra.parent.mkdir(parents=True)
    extra.write_text("{}")
    after = {name: fingerprint(experiment, STAGES[name]) for name in PLANS["train"]}
    assert {name for name in before if before[name] != after[name]} == {"report"}
