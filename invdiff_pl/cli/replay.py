"""``replay``: make a run folder's results anew from the command and YAML files kept in it."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from invdiff_pl.cli.experiment import run_experiment
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file, read_object
from invdiff_pl.workflow.records import RECORD, Listing, read_listing, read_record
from invdiff_pl.workflow.run import EXPERIMENTS, RUN_RECORD
from invdiff_pl.workflow.stages import PLANS

# Stages whose files hold a date or a path, or are derived from the others.
_DIFFERS = ("report", "card")
_COMPARED = (".safetensors", ".png", ".jsonl", ".csv", ".txt", ".jpg")


def run_replay(arguments: Sequence[str]) -> int:
    """Replay a run.

    Returns:
        exit status: 0 if the results are the same byte for byte, 1 otherwise.

    Raises:
        InvDiffError: if the folder holds no run, or a stage fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m invdiff_pl replay",
        description="Repeat a run in another folder, and compare the results.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--run-dir", dest="into", type=Path, help="new folder (default: RUN-replay)"
    )
    parser.add_argument("--print", action="store_true", help="print the command and stop")
    parser.add_argument(
        "--command", choices=tuple(PLANS), help="command to repeat, if several made the folder"
    )
    options = parser.parse_args(arguments)
    run_dir: Path = options.run_dir
    into = options.into or run_dir.with_name(f"{run_dir.name}-replay")
    command, words = command_of(run_dir, options.command)
    words = [*words, "--experiments", str(run_dir / EXPERIMENTS), "--run-dir", str(into)]
    print(f"python -m invdiff_pl {command} {shlex.join(words)}", flush=True)
    if options.print:
        return 0
    run_experiment(command, words)
    same, different = compare(run_dir, into, PLANS[command])
    for name in different[:20]:
        print(f"differs: {name}")
    print(f"{same} files are the same byte for byte, {len(different)} differ")
    return 1 if different or not same else 0


def command_of(run_dir: Path, chosen: str | None = None) -> tuple[str, list[str]]:
    """Return the command that made a run folder, and its arguments.

    Raises:
        InvDiffError: if none is on record.
    """
    path = run_dir / RUN_RECORD
    if not is_file(path):
        raise InvDiffError(f"{path} is missing, so the command of that run is not known.")
    known = read_object(path)
    command = chosen or ("train" if "train" in known else next(iter(known), ""))
    words = known.get(command)
    if command not in PLANS or not isinstance(words, list) or not all(map(_is_word, words)):
        raise InvDiffError(f"{path} records no command {command or 'at all'}: it was damaged.")
    return command, words


def _is_word(value: object) -> bool:
    return isinstance(value, str)


def compare(first: Path, second: Path, stages: Sequence[str]) -> tuple[int, list[str]]:
    """Compare the recorded digests of two run folders' results.

    Returns:
        the number of files that are the same, and the names of those that differ.
    """
    same, different = 0, []
    for name in stages:
        if name in _DIFFERS:
            continue
        ours, theirs = (dict(_results(folder / name)) for folder in (first, second))
        for file in sorted(ours.keys() | theirs.keys()):
            if ours.get(file) == theirs.get(file):
                same += 1
            else:
                different.append(f"{name}/{file}")
    return same, different


def _results(folder: Path) -> Iterator[tuple[str, tuple[int, str]]]:
    record = read_record(folder / RECORD)
    listing: Listing = (None if record is None else read_listing(folder, record)) or {}
    for name, facts in listing.items():
        if Path(name).suffix in _COMPARED:
            yield name, facts
