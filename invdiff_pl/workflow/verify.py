"""``verify``: check every file of a run folder against the digests recorded by its stages."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_folder
from invdiff_pl.workflow.records import (
    RECORD,
    STARTED,
    find_problems,
    own_files,
    read_listing,
    read_record,
)

_SHOWN = 20


def run_verify(arguments: Sequence[str]) -> int:
    """Verify a run folder.

    Returns:
        exit status: 0 if every recorded file exists and is unaltered, 1 otherwise.

    Raises:
        InvDiffError: if the folder holds no run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m invdiff_pl verify",
        description="Check every file of a run folder against the recorded digests.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    run_dir = parser.parse_args(arguments).run_dir
    stages = stage_folders(run_dir)
    if not stages:
        raise InvDiffError(f"{run_dir} holds no stage of a run: expected a run folder.")
    wrong = 0
    for folder in stages:
        told = list(_findings(folder))
        problems = [line for line in told if not line.startswith("note")]
        wrong += len(problems)
        print(f"{folder.name}: {f'{len(problems)} wrong' if problems else 'as recorded'}")
        for line in told[:_SHOWN]:
            print(f"  {line}")
        if len(told) > _SHOWN:
            print(f"  … and {len(told) - _SHOWN} more")
    print(f"{wrong} wrong" if wrong else "every recorded file is present and unaltered")
    return 1 if wrong else 0


def stage_folders(run_dir: Path) -> list[Path]:
    """Return the stages' folders in a run folder, finished or begun, in order of their records."""
    if not is_folder(run_dir):
        return []
    records = {
        folder: [path for name in (RECORD, STARTED) if (path := folder / name).is_file()]
        for folder in run_dir.iterdir()
        if folder.is_dir()
    }
    found = [folder for folder, paths in records.items() if paths]
    return sorted(found, key=lambda folder: (records[folder][0].stat().st_mtime_ns, folder.name))


def _findings(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a stage's folder, line by line; notes are merely worth knowing."""
    try:
        record = read_record(folder / RECORD)
        listing = None if record is None else read_listing(folder, record)
    except InvDiffError as error:
        yield f"altered: {error}"
        return
    if record is None:
        yield "unfinished: started but not completed; run the same command again"
        return
    if listing is None:
        yield "note: made by an earlier version, which recorded no digests"
        return
    for problem in find_problems(folder, listing, contents=True):
        yield f"{problem.what}: {folder / problem.file}"
    names = {path.relative_to(folder).as_posix() for path in own_files(folder)}
    for name in sorted(names - listing.keys()):
        yield f"note: not on record: {folder / name}"
