"""Running an experiment: every stage that is not current, with one visible command each."""

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
from invdiff_pl.workflow.experiment import Experiment, find_file, find_names
from invdiff_pl.workflow.provenance import provenance
from invdiff_pl.workflow.stages import LIGHTNING, Stage

# Records, in the run folder, the command that made it; the YAML files of the time are beside it.
RUN_RECORD = "run.json"
EXPERIMENTS = "experiments"


def run_plan(
    experiment: Experiment, command: str, words: Sequence[str], launcher: Sequence[str] = ()
) -> None:
    """Run the stages of a command that are not current, in order, and report the results.

    Args:
        experiment: experiment that the stages belong to.
        command: ``train``, ``augment`` or ``backbone``.
        words: arguments that give the same results in another run folder; they are kept in this
            one.
        launcher: words put before the command of a stage that runs on all devices.

    Raises:
        InvDiffError: if a stage fails.
    """
    plan = experiment.plan(command)
    with run_lock(experiment.run_dir, shlex.join([command, *words])) as lock:
        _record(experiment, command, words)
        started = time.monotonic()
        for number, stage in enumerate(plan, start=1):
            print(f"[{number}/{len(plan)}] {stage.name}: {stage.explains}", flush=True)
            if is_current(experiment, stage):
                print("      up to date", flush=True)
            else:
                run_stage(experiment, stage, launcher, lock)
        print(f"done in {time.monotonic() - started:.0f} s")
    _tell_results(experiment, plan[-1])


def _record(experiment: Experiment, command: str, words: Sequence[str]) -> None:
    """Keep the command and its YAML files in the run folder, so that it can be replayed."""
    run_dir = experiment.run_dir
    known = read_object(run_dir / RUN_RECORD) if (run_dir / RUN_RECORD).is_file() else {}
    write_json(run_dir / RUN_RECORD, {**known, command: list(words)})
    kept, source = run_dir / EXPERIMENTS, experiment.experiments
    if kept.exists() and source.exists() and kept.samefile(source):
        return
    names = [*experiment.names, *find_names("stages/*.yaml", source)]
    with atomic_path(kept) as partial:
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(find_file(name, source), partial / name)


def run_stage(
    experiment: Experiment, stage: Stage, launcher: Sequence[str] = (), lock: int = -1
) -> None:
    """Run a stage that is due in its own process, and record it.

    Args:
        experiment: experiment that the stage belongs to.
        stage: the stage, resumed if it was interrupted.
        launcher: words put before the command of a stage that runs on all devices.
        lock: descriptor of the run folder's lock, which the process keeps.

    Raises:
        InvDiffError: if the stage fails.
    """
    arguments = experiment.arguments(stage)
    goes_on = begin(experiment, stage)
    if goes_on and (checkpoint := _latest_checkpoint(experiment.folder(stage))):
        arguments += [f"--ckpt_path={checkpoint}", "--weights_only=true"]
    if goes_on:
        print("      resuming an interrupted run", flush=True)
    print("      python -m invdiff_pl " + shlex.join(arguments), flush=True)
    started = time.monotonic()
    spread = bool(launcher) and stage.command in LIGHTNING and not stage.one_device
    command = [*(launcher if spread else ()), sys.executable, "-m", "invdiff_pl", *arguments]
    try:
        ended = processes.call(command, lock, tied=not spread)
    except OSError as error:
        raise InvDiffError(f"{command[0]} cannot be started ({error.strerror}).") from None
    if ended.status != 0:
        raise InvDiffError(
            f"stage {stage.name} failed (status {ended.status}); fix what it reports and run the "
            "same command again: finished stages are kept."
        )
    facts = {
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory": ended.peak_memory,
        "command": ["python", "-m", "invdiff_pl", *arguments],
        "replay": replay_command(experiment.run_dir),
        **provenance(),
    }
    finish(experiment, stage, facts)


def replay_command(run_dir: Path) -> str:
    """Return the command that reproduces a run folder's results in another folder."""
    return "python -m invdiff_pl replay " + shlex.quote(str(run_dir))


def _latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint, regular or written by Lightning before a requeue."""
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
    logs = shlex.quote(str(run_dir / "tensorboard"))
    print(f"dashboard:           tensorboard --logdir {logs}")
    print(f"check every file:    python -m invdiff_pl verify {shlex.quote(str(run_dir))}")
    print(f"repeat the run:      {replay_command(run_dir)}")
