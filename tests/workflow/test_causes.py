"""What a stage's result depends on: source files, and callbacks that change it."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from invdiff_pl import callbacks
from invdiff_pl.cli.experiment import experiment_of
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.workflow import causes
from invdiff_pl.workflow.due import begin, fingerprint, finish, is_current
from invdiff_pl.workflow.experiment import Experiment
from invdiff_pl.workflow.stages import LIGHTNING, PLANS, STAGES

REPOSITORY = Path(__file__).parents[2]
INSTALLED = causes.PACKAGE
AFTER_ADAPTER = {"adapter", "samples", "report"}
MINE = """
import pytorch_lightning as pl

class Watcher(pl.Callback):
    pass

class Changer(pl.Callback):
    changes_result = True

class Further(Changer):
    pass
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's source, whose digests are taken in place of the installed one's."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "elsewhere" / "invdiff_pl"
    shutil.copytree(causes.PACKAGE, copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    monkeypatch.setattr(causes, "PACKAGE", copy)
    return copy


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own callbacks in the working folder."""
    (tmp_path / "my_callbacks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_callbacks", raising=False)


def _experiment(*flags: str, folder: Path = REPOSITORY / "experiments") -> Experiment:
    words = ["--experiment", "waterbirds", "--experiments", str(folder), "--run-dir", "run"]
    Path("backbone").mkdir(exist_ok=True)
    words += ["--backbone", "backbone"]
    return experiment_of("train", [*words, *flags])


def _marks(experiment: Experiment) -> dict[str, str]:
    causes._digest.cache_clear()
    causes._declared.cache_clear()
    return {name: fingerprint(experiment, STAGES[name]) for name in PLANS["train"]}


def _stale(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("objectives/rules.py", AFTER_ADAPTER),
        ("callbacks/heldout.py", AFTER_ADAPTER),
        ("adapters/lora.py", AFTER_ADAPTER),
        ("environments/judging.py", {"environments", *AFTER_ADAPTER}),
        ("metrics/bias.py", {"samples", "report"}),
        ("report/plots.py", {"report"}),
        ("data/synthetic/waterbirds.py", set(PLANS["train"])),
        ("callbacks/dashboard.py", set()),
        ("cli/main.py", set()),
        ("workflow/run.py", set()),
        ("utils/locks.py", set()),
    ],
)
def test_a_changed_file_makes_the_stages_due_that_run_it(
    file: str, stale: set[str], package: Path
) -> None:
    experiment = _experiment()
    before = _marks(experiment)
    with (package / file).open("a") as stream:
        stream.write("\nCHANGED = True\n")
    assert _stale(before, _marks(experiment)) == stale


def test_a_file_more_or_less_is_a_change(package: Path) -> None:
    before = _marks(_experiment())
    (package / "objectives" / "new.py").touch()
    assert _stale(before, _marks(_experiment())) == AFTER_ADAPTER
    (package / "objectives" / "new.py").unlink()
    assert _marks(_experiment()) == before


def test_the_same_version_elsewhere_is_no_change(package: Path, monkeypatch) -> None:
    elsewhere = _marks(_experiment())
    monkeypatch.setattr(causes, "PACKAGE", INSTALLED)
    assert _marks(_experiment()) == elsewhere


def test_a_finished_stage_is_due_after_a_change_and_says_why(package: Path, capsys) -> None:
    experiment, stage = _experiment(), STAGES["classifier"]
    begin(experiment, stage)
    finish(experiment, stage, {})
    assert is_current(experiment, stage)
    (package / "modules" / "attribute_classifier.py").write_text("")
    _marks(experiment)  # forget digests
    assert not is_current(experiment, stage)
    assert not begin(experiment, stage)
    assert "was made with another version of the code" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.logger=false"],
        ["--trainer.logger=my_loggers.Mine", "--trainer.logger.init_args.key=1"],
        ["--trainer.callbacks+=my_callbacks.Watcher", "--trainer.callbacks.every=3"],
        ['--trainer.callbacks+={"class_path": "my_callbacks.Watcher", "init_args": {"every": 3}}'],
        ["--trainer.callbacks+=[my_callbacks.Watcher, DeviceStatsMonitor]"],
        ["--trainer.callbacks+=not_there.Watcher"],
        ["--trainer.callbacks+=LearningRateMonitor"],
        ["--trainer.callbacks+=invdiff_pl.callbacks.SampleGrid"],
        ["--trainer.devices=2", "--trainer.enable_progress_bar=false"],
        ["--model.gradient_checkpointing=true", "--adapter.data.latent_device=memory"],
    ],
)  # fmt: skip
def test_flags_of_who_watches_make_nothing_due(flags: list[str], mine: None) -> None:
    assert _marks(_experiment()) == _marks(_experiment(*flags))


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.callbacks+=my_callbacks.Changer"],
        ["--trainer.callbacks+=my_callbacks.Further"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/loss"],
        ["--trainer.callbacks+=pytorch_lightning.callbacks.StochasticWeightAveraging"],
        ["--trainer.callbacks=[]"],  # without the average of the weights
    ],
)
def test_flags_of_callbacks_that_change_the_result_do(flags: list[str], mine: None) -> None:
    before = _marks(_experiment())
    assert _stale(before, _marks(_experiment(*flags))) == AFTER_ADAPTER


def test_settings_of_an_added_callback_count_if_it_does(mine: None) -> None:
    marks = [
        _marks(
            _experiment(f"--trainer.callbacks+=my_callbacks.{name}", f"--trainer.callbacks.n={n}")
        )
        for name in ("Changer", "Watcher")
        for n in (1, 2)
    ]
    assert marks[0] != marks[1]
    assert marks[2] == marks[3]


def test_a_users_logger_and_watcher_in_a_stages_file_make_nothing_due(
    mine: None, tmp_path: Path
) -> None:
    folder = tmp_path / "experiments"
    shutil.copytree(REPOSITORY / "experiments", folder)
    before = _marks(_experiment(folder=folder))
    file = folder / "stages" / "adapter.yaml"
    stage = yaml.safe_load(file.read_text())
    stage["trainer"]["logger"] = {"class_path": "my_loggers.Mine"}
    stage["trainer"]["callbacks"].append({"class_path": "my_callbacks.Watcher"})
    file.write_text(yaml.safe_dump(stage))
    assert _marks(_experiment(folder=folder)) == before
    stage["trainer"]["callbacks"].append({"class_path": "my_callbacks.Changer"})
    file.write_text(yaml.safe_dump(stage))
    assert _stale(before, _marks(_experiment(folder=folder))) == AFTER_ADAPTER


def test_the_file_of_a_users_own_model_counts(mine: None, tmp_path: Path) -> None:
    stage, paths = STAGES["adapter"], ["my_callbacks.Model"]
    before = causes.source_digest(stage, paths)
    assert before != causes.source_digest(stage)
    (tmp_path / "my_callbacks.py").write_text(MINE + "\n")
    assert causes.source_digest(stage, paths) != before


def test_what_callbacks_declare_is_what_counts() -> None:
    changing = {
        name for name in callbacks.__all__ if causes.changes_result(f"invdiff_pl.callbacks.{name}")
    }
    declared = {
        name
        for name in callbacks.__all__
        if getattr(getattr(callbacks, name), "changes_result", False)
    }
    assert changing == declared
    assert changing == {
        *("ExponentialMovingAverage", "GroupAccuracy", "HeldOutSelection", "LatentScale"),
        *("SampleEvaluation", "SaveAdapter", "SaveClassifier", "SaveEnvironments"),
        *("SavePipeline", "SaveSamples", "ScaleCalibration"),
    }


def _imported(file: Path) -> Iterator[Path]:
    """Files of the package that one imports; names of ``invdiff_pl.modules`` by where they are."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("invdiff_pl"):
            continue
        path = causes.PACKAGE.joinpath(*str(node.module).split(".")[1:])
        if path.name == "modules":
            continue  # each stage's own is followed by itself
        yield path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("name", [n for n, stage in STAGES.items() if stage.command in LIGHTNING])
def test_a_stages_rooms_hold_all_that_its_module_imports(name: str) -> None:
    stage = STAGES[name]
    settings = yaml.safe_load((REPOSITORY / "experiments/stages" / f"{name}.yaml").read_text())
    wanted = settings["model"]["class_path"].rpartition(".")[2]
    (own,) = (
        file
        for file in (causes.PACKAGE / "modules").glob("*.py")
        if f"class {wanted}(" in file.read_text()
    )
    seen, left = set(), [own]
    while left:
        file = left.pop()
        if file not in seen:
            seen.add(file)
            left += _imported(file)
    # Caches read images with what `backbones` offers; only encoded ones depend on how.
    aside = ["utils", "workflow/settings.py", "__init__.py"]
    aside += [] if "backbones" in stage.code else ["backbones"]
    for file in seen:
        relative = file.relative_to(causes.PACKAGE)
        if not any(relative.is_relative_to(room) for room in aside):
            assert any(relative.is_relative_to(room) for room in stage.code), relative


def test_what_is_due_is_told_without_torch() -> None:
    script = "import sys, invdiff_pl.workflow.due; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("part", "wrong", "told"),
    [
        ("trainer", "null", "trainer is not a group of settings"),
        ("model", "{init_args: text}", "model.init_args is not a group of settings"),
        ("data", "{init_args: null}", "data.init_args is not a group of settings"),
        ("model", "{class_path: [a]}", "model.class_path is not text"),
        ("trainer", "{callbacks: [{class_path: 3}]}", "trainer.callbacks is not a list of entries"),
    ],
)
def test_settings_of_a_wrong_form_are_told(part, wrong, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "experiments", "experiments")
    stage = Path("experiments/stages/environments.yaml")
    stage.write_text(f"{part}: {wrong}\n")
    experiment = _experiment(folder=Path("experiments"))
    with pytest.raises(InvDiffError, match=f"environments.yaml and the files before it: {told}"):
        fingerprint(experiment, STAGES["environments"])


def test_a_callback_of_a_wrong_form_is_left_to_the_stage_to_refuse(package: Path) -> None:
    entry = '{"class_path": "invdiff_pl.callbacks.ScaleCalibration", "init_args": 3}'
    before = _marks(_experiment())
    assert _marks(_experiment(f"--trainer.callbacks+=[{entry}]")) != before


@pytest.mark.parametrize("name", ["table", "prompt_map"])
def test_a_table_that_is_no_text_is_left_to_the_stage_to_refuse(name: str, package: Path) -> None:
    Path("pictures").mkdir()
    words = ["--experiment", "custom", "--experiments", str(REPOSITORY / "experiments")]
    words += ["--run-dir", "run", "--backbone", "backbone", "--data", "pictures"]
    Path("backbone").mkdir()
    experiment = experiment_of("train", [*words, f"--data.{name}={{a: b}}"])
    assert fingerprint(experiment, STAGES["classifier"])


def test_a_backbones_weights_count_and_its_card_and_hidden_files_do_not(package: Path) -> None:
    experiment = _experiment()
    weights = Path("backbone") / "unet" / "weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    before = _marks(experiment)
    (Path("backbone") / "README.md").write_text("a card")
    hidden = Path("backbone") / ".cache" / "huggingface"
    hidden.mkdir(parents=True)
    (hidden / "download.metadata").write_text("now")
    assert _marks(experiment) == before
    weights.write_bytes(b"2")
    assert "environments" in _stale(before, _marks(experiment))
