"""``variants``: several lambdas or adapters, trained at once on a finished run's environments.

``RUN/variants/together`` is where they are trained, in one adapter stage; each then becomes a run
of its own, ``RUN/variants/NAME``, with the run's classifier and environments, as if it had been
trained alone.
"""

import argparse
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from invdiff_pl.report.compare import run as compare
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path
from invdiff_pl.utils.locks import run_lock
from invdiff_pl.workflow.due import begin, finish, is_current
from invdiff_pl.workflow.experiment import Experiment
from invdiff_pl.workflow.records import RECORD, own_files, read_record, require_intact
from invdiff_pl.workflow.replay import command_of
from invdiff_pl.workflow.run import EXPERIMENTS, experiment_of, replay_command, run_stage
from invdiff_pl.workflow.run import run as run_experiment
from invdiff_pl.workflow.stages import STAGES, Stage

FOLDER = "variants"
TOGETHER = "together"
ADAPTER = STAGES["adapter"]
# What a variant takes over from the run.
GIVEN = (STAGES["classifier"], STAGES["environments"])
# Of the adapter stage's callbacks those that see the stage as a whole, not one adapter.
_WHOLE = (
    "invdiff_pl.callbacks.DenoiserForm",
    "invdiff_pl.callbacks.LocalBatch",
    "invdiff_pl.callbacks.StagePlan",
    "pytorch_lightning.callbacks.ModelCheckpoint",
)
# Of a stage's record what says where it belongs; the rest tells how it came about.
_PLACE = ("stage", "fingerprint", "config", "overrides", "inputs", "files", "replay")


def run(arguments: Sequence[str]) -> None:
    """Train variants together, finish each as a run, and compare them.

    Raises:
        InvDiffError: if the run lacks a stage, variants cannot share a frozen pass, or a stage
            fails.
    """
    options, common = _parser().parse_known_args(arguments)
    run_dir: Path = options.run_dir
    wanted = _wanted(options)
    words = [*_words(run_dir), *common]
    source = experiment_of("train", [*words, "--run-dir", str(run_dir)])
    _require_given(source)
    if "--data" not in words:  # what the run has drawn is data given to its variants
        words += ["--data", str(source.settings["experiment"]["data_root"])]
    lines = {
        name: [*words, *flags, "--run-dir", str(run_dir / FOLDER / name)]
        for name, flags in wanted.items()
    }
    runs = {name: experiment_of("train", line) for name, line in lines.items()}
    due = {name: own for name, own in runs.items() if not is_current(own, ADAPTER)}
    launcher = shlex.split(options.launcher or "")
    if due:
        together = experiment_of("train", [*words, "--run-dir", str(run_dir / FOLDER / TOGETHER)])
        _train(source, together, due, launcher)
    for name, own in runs.items():
        with run_lock(own.run_dir, shlex.join(["variants", *arguments])):
            _take_given(source, own)
            trained = run_dir / FOLDER / TOGETHER / ADAPTER.name
            _take_over(own, ADAPTER, trained / name, trained, {"trained_with": sorted(due)})
    for line in lines.values():
        print("python -m invdiff_pl train " + shlex.join(line), flush=True)
        run_experiment("train", [*line, *(["--launcher", options.launcher] if launcher else [])])
    compare([str(own.run_dir) for own in runs.values()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m invdiff_pl variants",
        description="Train several lambdas or adapters at once, on one pass of the frozen denoiser "
        "and on a run's environments; each becomes a run RUN/variants/NAME.",
        epilog="Any other flag is as of `train`, and goes to all variants, such as "
        "--model.adapter=small_unet, --trainer.max_steps=500 or --devices=8.",
        allow_abbrev=False,
    )
    parser.add_argument("--run-dir", type=Path, required=True, metavar="RUN", help="run folder")
    parser.add_argument(
        "--lambdas", nargs="+", default=[], metavar="L", help="a variant lambda-L for each"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar='"NAME FLAG …"',
        help='a variant with flags of its own, such as "wide --model.adapter_settings.ratio=0.3"; '
        "may be given several times",
    )
    parser.add_argument("--launcher", metavar="COMMAND", help="as of train")
    return parser


def _wanted(options: argparse.Namespace) -> dict[str, list[str]]:
    """Each variant's own flags, by name."""
    wanted: dict[str, list[str]] = {}
    given = [(f"lambda-{text}", [f"--model.lambda_={text}"]) for text in options.lambdas]
    for text in options.variant:
        name, *flags = shlex.split(text) or [""]
        given.append((name, flags))
    for name, flags in given:
        if not re.fullmatch(r"\w[\w.+-]*", name) or name == TOGETHER:
            raise InvDiffError(
                f"--variant: {name!r} is no name for a folder: expected letters, digits, '-', '.' "
                f"and not {TOGETHER!r}, and the variant's flags after it, all in quotes."
            )
        if name in wanted:
            raise InvDiffError(f"--variant: there are two of the name {name}.")
        if wrong := [flag for flag in flags if not flag.startswith("--model.")]:
            raise InvDiffError(
                f"--variant: {name} has {wrong[0]}: variants differ in --model.… flags, each as "
                "--model.KEY=VALUE; others go to all variants."
            )
        wanted[name] = flags
    if not wanted:
        raise InvDiffError('give --lambdas (LAMBDAS="0 1 10"), or --variant once or several times.')
    return wanted


def _words(run_dir: Path) -> list[str]:
    """The arguments of ``train`` that made a run, less its folder."""
    command, words = command_of(run_dir)
    if command == "backbone":
        raise InvDiffError(f"{run_dir} was made by `backbone`: give a folder of `make train`.")
    return [*words, "--experiments", str(run_dir / EXPERIMENTS)]


def _require_given(source: Experiment) -> None:
    for stage in GIVEN:
        if not is_current(source, stage):
            raise InvDiffError(
                f"{source.folder(stage)} is not there, or was made with other settings than the "
                "variants ask for: finish that run first, or leave out flags that change it."
            )


def _train(
    source: Experiment, together: Experiment, due: dict[str, Experiment], launcher: Sequence[str]
) -> None:
    """Train the variants that are due in one adapter stage."""
    from invdiff_pl.cli.lightning import settings  # noqa: PLC0415 - takes seconds
    from invdiff_pl.modules.adapter_variants import require_shareable  # noqa: PLC0415

    models: dict[str, dict[str, Any]] = {
        name: {
            **settings(own.arguments(ADAPTER))["model"]["init_args"],
            "output": str(together.folder(ADAPTER) / name),
        }
        for name, own in due.items()
    }
    require_shareable(models)
    flags = together.overrides.get(ADAPTER.name, ())
    kept = tuple(flag for flag in flags if not flag.startswith("--model"))
    with run_lock(together.run_dir, "variants") as lock:
        together = replace(
            together,
            stage_folder=_write_stages(together, models),
            overrides={**together.overrides, ADAPTER.name: kept},
        )
        _take_given(source, together)
        print(f"training together: {', '.join(due)}", flush=True)
        if not is_current(together, ADAPTER):
            run_stage(together, ADAPTER, launcher, lock)


def _write_stages(together: Experiment, models: dict[str, dict[str, Any]]) -> Path:
    """The stages' YAML files, with an adapter stage that trains several."""
    folder = together.run_dir / EXPERIMENTS / "stages"
    with atomic_path(folder) as partial:
        shutil.copytree(together.stage_folder, partial)
        file = partial / f"{ADAPTER.name}.yaml"
        stage: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        stage["model"] = {
            "class_path": "invdiff_pl.modules.AdapterVariants",
            "init_args": {"output": "${experiment.run_dir}/adapter", "variants": models},
        }
        callbacks = stage["trainer"]["callbacks"]
        own = {
            "class_path": "invdiff_pl.callbacks.PerVariant",
            "init_args": {
                "callbacks": [c for c in callbacks if c["class_path"] not in _WHOLE],
                "logs": str(together.run_dir.parent),
            },
        }
        whole = [c for c in callbacks if c["class_path"] in _WHOLE]
        stage["trainer"]["callbacks"] = [*whole, own]
        OmegaConf.save(OmegaConf.create(stage), file)
    return folder


def _take_given(source: Experiment, target: Experiment) -> None:
    """Take over the run's classifier and environments."""
    for stage in GIVEN:
        folder = source.folder(stage)
        _take_over(target, stage, folder, folder)


def _take_over(
    target: Experiment,
    stage: Stage,
    results: Path,
    made_by: Path,
    facts: dict[str, Any] | None = None,
) -> None:
    """Copy a stage's results into another run, where they are what the stage would make.

    Args:
        target: the other run.
        stage: in it.
        results: that are copied.
        made_by: the stage's folder, whose record tells how they came about.
        facts: further ones for the record.
    """
    if is_current(target, stage):
        return
    record = read_record(made_by / RECORD)
    if record is None:
        raise InvDiffError(f"{made_by / RECORD} is missing: run the same command again.")
    require_intact(made_by)
    begin(target, stage)
    for file in own_files(results):
        copy = target.folder(stage) / file.relative_to(results)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    told = {key: value for key, value in record.items() if key not in _PLACE}
    places = {"taken_from": str(results), "replay": replay_command(target.run_dir)}
    finish(target, stage, {**told, **places, **(facts or {})})
