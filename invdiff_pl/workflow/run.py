"""Running an experiment: every stage that is not current, one visible command each."""

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from invdiff_pl.utils import processes
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path, read_object, write_json
from invdiff_pl.utils.locks import run_lock
from invdiff_pl.workflow.due import begin, finish, is_current
from invdiff_pl.workflow.experiment import PACKAGED, Experiment, find_file, find_names
from invdiff_pl.workflow.provenance import provenance
from invdiff_pl.workflow.stages import LIGHTNING, MAIN_STAGE, PLANS, STAGES, Stage

# Tells, in the run folder, the command that made it; beside it lie the YAML files of the time.
RUN_RECORD = "run.json"
EXPERIMENTS = "experiments"
SHARED_GROUPS = ("data", "scale", "experiment", "evaluation", "seed_everything")


def run(command: str, arguments: Sequence[str]) -> None:
    """Run ``train`` or ``backbone``: the stages of the plan, in order.

    Raises:
        InvDiffError: if a setting is wrong or a stage fails.
    """
    options, overrides = _parser(command).parse_known_args(arguments)
    experiment = _experiment(command, options, overrides)
    plan = experiment.plan(command)
    due = [stage for stage in plan if not is_current(experiment, stage)]
    if overrides and any(stage.command in LIGHTNING for stage in due):
        _check_arguments(experiment, due)
    with run_lock(experiment.run_dir, shlex.join([command, *arguments])) as lock:
        _record_run(command, experiment, options, overrides)
        started = time.monotonic()
        for number, stage in enumerate(plan, start=1):
            print(f"[{number}/{len(plan)}] {stage.name}: {stage.explains}", flush=True)
            if is_current(experiment, stage):
                print("      up to date", flush=True)
            else:
                run_stage(experiment, stage, shlex.split(options.launcher or ""), lock)
        print(f"done in {time.monotonic() - started:.0f} s")
    _tell_results(experiment, plan[-1])


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m invdiff_pl {command}",
        description=f"Run the stages: {', '.join(PLANS[command])}.",
        epilog="Any other --key=value is a Lightning CLI override. "
        f"--model.… and --trainer.… go to the {MAIN_STAGE[command]} stage, --STAGE.model.… to the "
        "stage named, --data.…, --scale.…, --evaluation.… and --seed_everything to all.",
        allow_abbrev=False,
    )
    parser.add_argument("--experiment", required=True, help="name of a file in experiments/")
    parser.add_argument("--scale", default="mini", help="name of a file in experiments/scales/")
    parser.add_argument(
        "--experiments",
        type=Path,
        default=Path("experiments"),
        metavar="DIR",
        help="folder of your own settings; files that are not there are taken from the package",
    )
    parser.add_argument("--data", help="folder of the data set; drawn stand-ins if not given")
    parser.add_argument(
        "--backbone",
        help="pipeline folder or hub id; the shipped one otherwise (backbone: what to fine-tune)",
    )
    parser.add_argument("--run-dir", help="run folder; runs/EXPERIMENT/SCALE otherwise")
    parser.add_argument("--devices", help="devices a node, as Lightning takes them")
    parser.add_argument("--num-nodes", type=int, default=1, help="machines; needs --launcher")
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="put before the stages that run on all devices, such as srun; otherwise Lightning "
        "starts the processes of one machine itself",
    )
    return parser


def _experiment(command: str, options: argparse.Namespace, overrides: Sequence[str]) -> Experiment:
    folder: Path = options.experiments
    files = {
        "experiment": f"{options.experiment}.yaml",
        "base": "base.yaml",
        "scale": f"scales/{options.scale}.yaml",
    }
    paths = {kind: find_file(name, folder) for kind, name in files.items()}
    for kind in ("experiment", "scale"):
        if not paths[kind].is_file():
            pattern = str(Path(files[kind]).with_name("*.yaml"))
            known = [Path(name).stem for name in find_names(pattern, folder)]
            raise InvDiffError(
                f"--{kind}: there is no {files[kind]} in {folder} or {PACKAGED}; expected one of: "
                f"{', '.join(name for name in known if name != 'base') or 'none'}."
            )
    by_stage, shared = _sort_overrides(command, overrides)
    run_dir = options.run_dir or f"runs/{options.experiment}/{options.scale}"
    flags = [f"--experiment.run_dir={run_dir}"]
    if options.data:
        flags.append(f"--experiment.data_root={options.data}")
    own_backbone = Path(run_dir) / "backbone" / "pipeline"
    if options.backbone:
        setting = "start" if command == "backbone" else "backbone"
        flags.append(f"--experiment.{setting}={options.backbone}")
    elif command in ("train", "augment") and own_backbone.is_dir():
        flags.append(f"--experiment.backbone={own_backbone}")
    if options.num_nodes > 1 and not options.launcher:
        raise InvDiffError(
            f"--num-nodes={options.num_nodes} needs --launcher=, the command that starts a stage "
            "on every node, such as --launcher=srun; see experiments/cluster/."
        )
    devices = [f"--trainer.devices={options.devices}"] if options.devices else []
    if options.num_nodes > 1:
        devices.append(f"--trainer.num_nodes={options.num_nodes}")
    return Experiment(
        files=tuple(paths.values()),
        experiments=folder,
        flags=(*flags, *shared),
        overrides=by_stage,
        rendered=not options.data,
        fine_tunes=command == "backbone" and bool(options.backbone),
        devices=tuple(devices),
    )


def _sort_overrides(
    command: str, overrides: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Overrides by the stage they name, and those that go to all stages."""
    by_stage: dict[str, tuple[str, ...]] = {}
    shared = []
    for flag in _joined(overrides):
        group = flag.removeprefix("--").split("=")[0].split(".")[0]
        if group in SHARED_GROUPS:
            shared.append(flag)
        elif group in STAGES and group != "data":
            rest = "--" + flag.removeprefix(f"--{group}.")
            by_stage[group] = (*by_stage.get(group, ()), rest)
        elif group in ("model", "trainer"):
            main = MAIN_STAGE[command]
            by_stage[main] = (*by_stage.get(main, ()), flag)
        elif group == "render":
            by_stage["data"] = (*by_stage.get("data", ()), "--" + flag.removeprefix("--render."))
        else:
            raise InvDiffError(
                f"{flag}: expected --model.…, --trainer.…, --data.…, --scale.…, --evaluation.…, "
                f"--seed_everything or --STAGE.… with STAGE one of {', '.join(PLANS[command])} "
                "(render for the stand-in pictures)."
            )
    return by_stage, shared


def _joined(overrides: Sequence[str]) -> list[str]:
    """``--key value`` as ``--key=value``."""
    flags: list[str] = []
    for word in overrides:
        if word.startswith("--"):
            flags.append(word)
        elif flags and "=" not in flags[-1]:
            flags[-1] += f"={word}"
        else:
            raise InvDiffError(f"{word!r} is no flag: overrides have the form --key=value.")
    return flags


def _check_arguments(experiment: Experiment, due: Sequence[Stage]) -> None:
    """Parse every due stage's arguments first: a mistyped key should not wait for its stage."""
    from invdiff_pl.cli.lightning import check  # noqa: PLC0415 - takes seconds, and only overrides need it

    for stage in due:
        if stage.command in LIGHTNING:
            check(experiment.arguments(stage))


def _record_run(
    command: str, experiment: Experiment, options: argparse.Namespace, overrides: Sequence[str]
) -> None:
    """Keep the command and its YAML files in the run folder, to replay it from."""
    run_dir, source = experiment.run_dir, Path(options.experiments)
    words = ["--experiment", options.experiment, "--scale", options.scale]
    if options.data:
        words += ["--data", options.data]
    if command != "backbone":
        words += ["--backbone", str(experiment.settings["experiment"]["backbone"])]
    elif options.backbone:
        words += ["--backbone", options.backbone]
    known = read_object(run_dir / RUN_RECORD) if (run_dir / RUN_RECORD).is_file() else {}
    write_json(run_dir / RUN_RECORD, {**known, command: [*words, *_joined(overrides)]})
    kept = run_dir / EXPERIMENTS
    if kept.exists() and kept.samefile(source):
        return
    names = [f"{options.experiment}.yaml", "base.yaml", f"scales/{options.scale}.yaml"]
    names += find_names("stages/*.yaml", source)
    with atomic_path(kept) as partial:
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(find_file(name, source), partial / name)


def run_stage(
    experiment: Experiment, stage: Stage, launcher: Sequence[str] = (), lock: int = -1
) -> None:
    """Run a stage that is due in a process of its own, and record it.

    Args:
        experiment: that it belongs to.
        stage: goes on where it was interrupted.
        launcher: words put before the command of a stage that runs on all devices.
        lock: descriptor of the run folder's lock, which the process keeps.

    Raises:
        InvDiffError: if it fails.
    """
    arguments = experiment.arguments(stage)
    goes_on = begin(experiment, stage)
    if goes_on and (checkpoint := _latest_checkpoint(experiment.folder(stage))):
        arguments += [f"--ckpt_path={checkpoint}", "--weights_only=true"]
    if goes_on:
        print("      going on from an interrupted run", flush=True)
    print("      python -m invdiff_pl " + shlex.join(arguments), flush=True)
    started = time.monotonic()
    spread = bool(launcher) and stage.command in LIGHTNING and not stage.one_device
    command = [*(launcher if spread else ()), sys.executable, "-m", "invdiff_pl", *arguments]
    try:
        status = processes.call(command, lock, tied=not spread)
    except OSError as error:
        raise InvDiffError(f"{command[0]} cannot be started ({error.strerror}).") from None
    if status != 0:
        raise InvDiffError(
            f"stage {stage.name} failed (status {status}); mend what it says and run the same "
            "command again: finished stages are kept."
        )
    facts = {
        "seconds": round(time.monotonic() - started, 1),
        "command": ["python", "-m", "invdiff_pl", *arguments],
        "replay": replay_command(experiment.run_dir),
        **provenance(),
    }
    finish(experiment, stage, facts)


def replay_command(run_dir: Path) -> str:
    """The command that makes a run folder's results anew, in another folder."""
    return "python -m invdiff_pl replay " + shlex.quote(str(run_dir))


def _latest_checkpoint(folder: Path) -> Path | None:
    """The newest of the regular checkpoint and those that Lightning writes before a requeue."""
    found = [*folder.glob("checkpoints/last*.ckpt"), *folder.glob("hpc_ckpt_*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _tell_results(experiment: Experiment, last: Stage) -> None:
    folder = experiment.folder(last)
    run_dir = folder.parent
    if last.name == "report":
        print((folder / "report.md").read_text(encoding="utf-8"))
        print(f"report and pictures: {folder}")
        print(f"samples:             {run_dir / 'samples'}")
        print(f"adapter (LoRA file): {run_dir / 'adapter' / 'adapter'}")
    else:
        print((folder / "card.md").read_text(encoding="utf-8"))
        print(f"backbone:            {run_dir / 'backbone' / 'pipeline'}")
    print(f"dashboard:           tensorboard --logdir {run_dir / 'tensorboard'}")
    print(f"check every file:    python -m invdiff_pl verify {shlex.quote(str(run_dir))}")
    print(f"make it anew:        {replay_command(run_dir)}")
