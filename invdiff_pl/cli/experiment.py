"""``train``, ``augment`` and ``backbone``: parsing and checking their flags, and running them."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from invdiff_pl.cli.preflight import check_arguments, check_backbones, check_data
from invdiff_pl.data.prompt_lists import read_prompts
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file, is_folder
from invdiff_pl.utils.names import NEW_FAMILIES, require_name
from invdiff_pl.workflow.due import is_current
from invdiff_pl.workflow.experiment import (
    PACKAGED,
    Experiment,
    find_file,
    find_names,
    scale_files,
)
from invdiff_pl.workflow.run import run_plan
from invdiff_pl.workflow.stages import LIGHTNING, MAIN_STAGE, PLANS, STAGES

# The experiment that --prompts implies.
GENERATED_EXPERIMENT = "prompts"
SHARED_GROUPS = ("data", "scale", "experiment", "evaluation", "seed_everything")


def run_experiment(command: str, arguments: Sequence[str]) -> None:
    """Run the stages of a command that are not current, in order.

    Raises:
        InvDiffError: if a setting is wrong or a stage fails.
    """
    options, overrides = _parser(command).parse_known_args(arguments)
    experiment = _experiment(command, options, overrides)
    due = [stage for stage in experiment.plan(command) if not is_current(experiment, stage)]
    check_backbones(command, experiment, due)
    check_arguments(experiment, due, bool(overrides))
    if not experiment.rendered and any(stage.command in LIGHTNING for stage in due):
        for line in check_data(experiment, due):
            print(f"data: {line}", flush=True)
    run_plan(
        experiment,
        command,
        _recorded(command, experiment, options, overrides),
        shlex.split(options.launcher or ""),
    )


def experiment_of(command: str, arguments: Sequence[str]) -> Experiment:
    """Return the experiment that arguments of ``train``, ``augment`` or ``backbone`` describe.

    Raises:
        InvDiffError: if a file is missing or a flag belongs to no stage.
    """
    options, overrides = _parser(command).parse_known_args(arguments)
    return _experiment(command, options, overrides)


def _recorded(
    command: str, experiment: Experiment, options: argparse.Namespace, overrides: Sequence[str]
) -> list[str]:
    """Return the arguments that give the same results in another run folder."""
    words = ["--experiment", options.experiment, "--scale", options.scale]
    if options.data:
        words += ["--data", options.data]
    if options.prompts is not None:
        words += ["--prompts", options.prompts]
    if command != "backbone":
        words += ["--backbone", str(experiment.settings["experiment"]["backbone"])]
    elif options.backbone:
        words += ["--backbone", options.backbone]
    if options.family:
        words += ["--family", options.family]
    return [*words, *_joined(overrides)]


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m invdiff_pl {command}",
        description=f"Run the stages: {', '.join(PLANS[command])}.",
        epilog="Any other --key=value is a Lightning CLI override. "
        f"--model.… and --trainer.… go to the {MAIN_STAGE[command]} stage, --STAGE.model.… to the "
        "stage named, --data.…, --scale.…, --evaluation.… and --seed_everything to all; "
        "--adapter.candidate=2 trains on candidate 2 of environments/discover.html, 0,1 on both.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--experiment", help="name of a file in experiments/ (default with --prompts: prompts)"
    )
    parser.add_argument(
        "--prompts",
        help="without a data set, prompts to draw images of with the backbone: a shipped list, a "
        'file with one prompt per line, or "a; b"',
    )
    parser.add_argument("--scale", default="mini", help="name of a file in experiments/scales/")
    parser.add_argument(
        "--experiments",
        type=Path,
        default=Path("experiments"),
        metavar="DIR",
        help="folder of your own settings; files that it lacks are taken from the package",
    )
    parser.add_argument("--data", help="folder of the data set (default: drawn stand-ins)")
    parser.add_argument(
        "--backbone",
        help="pipeline folder or hub id (default: the shipped one; backbone: what to fine-tune)",
    )
    parser.add_argument(
        "--family",
        help="family of a new small backbone: sd (default), or sana, a flow-matching transformer",
    )
    parser.add_argument("--run-dir", help="run folder (default: runs/EXPERIMENT/SCALE)")
    parser.add_argument("--devices", help="devices per node, as for Lightning's Trainer")
    parser.add_argument(
        "--num-nodes", type=int, default=1, help="number of machines; needs --launcher"
    )
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="command that starts stages on all devices, such as srun; without it Lightning starts "
        "the processes of one machine itself",
    )
    return parser


def _experiment(command: str, options: argparse.Namespace, overrides: Sequence[str]) -> Experiment:
    folder: Path = options.experiments
    if options.prompts is not None:
        read_prompts(options.prompts)  # refused before anything is loaded
        options.experiment = options.experiment or GENERATED_EXPERIMENT
    if options.experiment is None:
        raise InvDiffError("--experiment: expected the name of a file in experiments/.")
    files = {
        "experiment": f"{options.experiment}.yaml",
        "base": "base.yaml",
    }
    *extended, files["scale"] = scale_files(options.scale, folder)
    for kind in ("experiment", "scale"):
        if not is_file(find_file(files[kind], folder)):
            pattern = str(Path(files[kind]).with_name("*.yaml"))
            known = [Path(name).stem for name in find_names(pattern, folder)]
            raise InvDiffError(
                f"--{kind}: there is no {files[kind]} in {folder} or {PACKAGED}; expected one of: "
                f"{', '.join(name for name in known if name != 'base') or 'none'}."
            )
    names = [files["experiment"], files["base"], *extended, files["scale"]]
    by_stage, shared = _sort_overrides(command, overrides)
    run_dir = options.run_dir or f"runs/{options.experiment}/{options.scale}"
    flags = [f"--experiment.run_dir={run_dir}"]
    if options.data:
        flags.append(f"--experiment.data_root={options.data}")
    own_backbone = Path(run_dir) / "backbone" / "pipeline"
    if options.backbone:
        setting = "start" if command == "backbone" else "backbone"
        flags.append(f"--experiment.{setting}={options.backbone}")
    elif command in ("train", "augment") and is_folder(own_backbone):
        flags.append(f"--experiment.backbone={own_backbone}")
    if options.family:
        _require_family(command, options)
        flags.append(f"--experiment.family={options.family}")
    if options.prompts is not None:
        flags.append(f"--data.prompts={options.prompts}")
    _require_launcher(options)
    devices = [f"--trainer.devices={options.devices}"] if options.devices else []
    if options.num_nodes > 1:
        devices.append(f"--trainer.num_nodes={options.num_nodes}")
    experiment = Experiment(
        files=tuple(find_file(name, folder) for name in names),
        experiments=folder,
        flags=(*flags, *shared),
        overrides=by_stage,
        rendered=not options.data,
        fine_tunes=command == "backbone" and bool(options.backbone),
        devices=tuple(devices),
    )
    shipped = experiment.settings["experiment"].get("shipped")
    if shipped and not any(flag.startswith("--experiment.backbone=") for flag in flags):
        preset = f"--experiment.backbone=asset:{shipped}"
        return replace(experiment, flags=(preset, *experiment.flags))
    return experiment


def _require_family(command: str, options: argparse.Namespace) -> None:
    if command != "backbone" or options.backbone:
        raise InvDiffError(
            f"--family={options.family}: expected only with `backbone`, and without --backbone, "
            "whose family is kept."
        )
    require_name("--family", options.family, NEW_FAMILIES)


def _require_launcher(options: argparse.Namespace) -> None:
    if options.num_nodes > 1 and not options.launcher:
        raise InvDiffError(
            f"--num-nodes={options.num_nodes} needs --launcher=, the command that starts a stage "
            "on every node, such as --launcher=srun; see experiments/cluster/."
        )


def _sort_overrides(
    command: str, overrides: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return overrides by the stage that they name, and those that go to all stages."""
    by_stage: dict[str, tuple[str, ...]] = {}
    shared = []
    for flag in _joined(overrides):
        group = flag.removeprefix("--").split("=")[0].split(".")[0]
        if group in SHARED_GROUPS:
            shared.append(flag)
        elif group in STAGES and group != "data":
            rest = "--" + flag.removeprefix(f"--{group}.")
            if rest.startswith("--candidate="):  # a candidate of the environments stage
                rest = f"--data.{rest.removeprefix('--')}"
            by_stage[group] = (*by_stage.get(group, ()), rest)
        elif group in ("model", "trainer"):
            main = MAIN_STAGE[command]
            by_stage[main] = (*by_stage.get(main, ()), flag)
        elif group in ("render", "generate"):
            rest = "--" + flag.removeprefix(f"--{group}.")
            by_stage["data"] = (*by_stage.get("data", ()), rest)
        else:
            raise InvDiffError(
                f"{flag}: expected --model.…, --trainer.…, --data.…, --scale.…, --evaluation.…, "
                f"--seed_everything or --STAGE.… with STAGE one of {', '.join(PLANS[command])} "
                "(render for the stand-in pictures, generate for images drawn of prompts)."
            )
    return by_stage, shared


def _joined(overrides: Sequence[str]) -> list[str]:
    """Join ``--key value`` to ``--key=value``."""
    flags: list[str] = []
    for word in overrides:
        if word.startswith("--"):
            flags.append(word)
        elif flags and "=" not in flags[-1]:
            flags[-1] += f"={word}"
        else:
            raise InvDiffError(f"{word!r} is not a flag: overrides have the form --key=value.")
    return flags
