"""Running an experiment: every stage that is not current, one visible command each."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from invdiff_pl.errors import InvDiffError
from invdiff_pl.provenance import provenance
from invdiff_pl.stages import (
    LIGHTNING,
    MAIN_STAGE,
    PLANS,
    STAGES,
    Experiment,
    Stage,
    begin,
    finish,
    is_current,
)

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
    started = time.monotonic()
    for number, stage in enumerate(plan, start=1):
        print(f"[{number}/{len(plan)}] {stage.name}: {stage.explains}", flush=True)
        if is_current(experiment, stage):
            print("      up to date", flush=True)
        else:
            _run_stage(experiment, stage)
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
    parser.add_argument("--experiments", type=Path, default=Path("experiments"), metavar="DIR")
    parser.add_argument("--data", help="folder of the data set; drawn stand-ins if not given")
    parser.add_argument(
        "--backbone",
        help="pipeline folder or hub id; the shipped one otherwise (backbone: what to fine-tune)",
    )
    parser.add_argument("--run-dir", help="run folder; runs/EXPERIMENT/SCALE otherwise")
    parser.add_argument("--devices", help="devices a node, as Lightning takes them")
    return parser


def _experiment(command: str, options: argparse.Namespace, overrides: Sequence[str]) -> Experiment:
    folder: Path = options.experiments
    for kind, path in (
        ("experiment", folder / f"{options.experiment}.yaml"),
        ("scale", folder / "scales" / f"{options.scale}.yaml"),
    ):
        if not path.is_file():
            known = sorted(p.stem for p in path.parent.glob("*.yaml") if p.stem != "base")
            raise InvDiffError(
                f"--{kind}: there is no {path}; expected one of: {', '.join(known) or 'none'}."
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
    if options.devices:
        flags.append(f"--trainer.devices={options.devices}")
    return Experiment(
        files=(
            folder / f"{options.experiment}.yaml",
            folder / "base.yaml",
            folder / "scales" / f"{options.scale}.yaml",
        ),
        stage_folder=folder / "stages",
        flags=(*flags, *shared),
        overrides=by_stage,
        rendered=not options.data,
        fine_tunes=command == "backbone" and bool(options.backbone),
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
    from invdiff_pl.cli import check  # noqa: PLC0415 - takes seconds, and only overrides need it

    for stage in due:
        if stage.command in LIGHTNING:
            check(experiment.arguments(stage))


def _run_stage(experiment: Experiment, stage: Stage) -> None:
    arguments = experiment.arguments(stage)
    goes_on = begin(experiment, stage)
    checkpoint = experiment.folder(stage) / "checkpoints" / "last.ckpt"
    if goes_on and checkpoint.is_file():
        arguments += [f"--ckpt_path={checkpoint}", "--weights_only=true"]
    if goes_on:
        print("      going on from an interrupted run", flush=True)
    print("      python -m invdiff_pl " + shlex.join(arguments), flush=True)
    started = time.monotonic()
    status = _call([sys.executable, "-m", "invdiff_pl", *arguments])
    if status != 0:
        raise InvDiffError(
            f"stage {stage.name} failed (status {status}); mend what it says and run the same "
            "command again: finished stages are kept."
        )
    facts = {
        "seconds": round(time.monotonic() - started, 1),
        "command": ["python", "-m", "invdiff_pl", *arguments],
        **provenance(),
    }
    finish(experiment, stage, facts)


def _call(command: Sequence[str]) -> int:
    """Run a stage; pass Ctrl-C and SIGTERM on and wait for it, so that nothing is left behind."""
    process = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


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
