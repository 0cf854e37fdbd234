"""Records of a stage: how its result came about, and the length and digest of every file.

``stage.json`` holds settings, provenance and a digest of itself; ``files.json`` lists the files.
This module does not import torch.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import (
    digest_file,
    digest_json,
    is_leftover,
    read_object,
    remove,
    write_json,
)
from invdiff_pl.utils.locks import LOCK

RECORD = "stage.json"
STARTED = "started.json"
FILES = "files.json"
_OWN = (RECORD, STARTED, FILES, LOCK)

Listing = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Problem:
    """A file that is not as it was when its stage finished.

    Attributes:
        file: path relative to the stage's folder.
        what: ``missing``, ``cut`` (shorter) or ``altered`` (longer, or other content).
    """

    file: str
    what: str


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with a digest of itself."""
    plain = json.loads(json.dumps(record))  # as it will be read: lists for tuples, and so on
    write_json(path, {**plain, "digest": digest_json(plain)})


def read_record(path: Path) -> dict[str, Any] | None:
    """Read what :func:`write_record` wrote; ``None`` if there is no such file.

    Raises:
        InvDiffError: if it is damaged or was changed by hand.
    """
    if not path.is_file():
        return None
    remedy = (
        f"restore it, or remove the folder {path.parent} and run the same command again, which "
        "repeats the stage"
    )
    try:
        record = read_object(path, fingerprint=str)
    except InvDiffError as error:
        raise InvDiffError(f"{str(error).rsplit(':', 1)[0]}: {remedy}.") from None
    # Records of earlier versions carry no digest.
    if "digest" in record and record.pop("digest") != digest_json(record):
        raise InvDiffError(f"{path} was changed after the stage had written it: {remedy}.")
    return record


def own_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a stage, sorted, without its records and what killed writers left."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(is_leftover(Path(part)) for part in relative.parts):
            continue
        if path.is_file() and (len(relative.parts) > 1 or path.name not in _OWN):
            yield path


def write_listing(folder: Path) -> dict[str, Any]:
    """List a stage's files in ``files.json``.

    Returns:
        number of files, their bytes and the list's digest, for the record.
    """
    listing: dict[str, dict[str, Any]] = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "digest": digest_file(path),
        }
        for path in own_files(folder)
    }
    write_json(folder / FILES, listing)
    total = sum(entry["bytes"] for entry in listing.values())
    return {"count": len(listing), "bytes": total, "digest": digest_json(listing)}


def read_listing(folder: Path, record: Mapping[str, Any]) -> Listing | None:
    """Read the length and digest of each file that a record vouches for.

    Returns:
        both by path relative to the folder; ``None`` for records of earlier versions, which have
        none.

    Raises:
        InvDiffError: if the list is missing, damaged, or not the one that the record vouches for.
    """
    facts = record.get("files")
    if facts is None:
        return None
    path = folder / FILES
    try:
        listing = read_object(path)
    except InvDiffError:
        listing = {}
    if not isinstance(facts, dict) or facts.get("digest") != digest_json(listing):
        raise InvDiffError(
            f"{path} is missing, or not the list that {RECORD} beside it vouches for: restore it, "
            f"or remove the folder {folder} and run the same command again, which repeats the "
            "stage."
        )
    try:
        found = {
            name: (int(entry["bytes"]), str(entry["digest"])) for name, entry in listing.items()
        }
    except (TypeError, KeyError, ValueError):
        raise InvDiffError(f"{path} is not a list of files: remove {folder} and rerun.") from None
    for name in found:
        # A run folder may come from elsewhere, and damaged files are removed by their names.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InvDiffError(f"{path} names {name!r}, outside its folder: remove {folder}.")
    return found


def find_problems(folder: Path, listing: Listing, *, contents: bool) -> Iterator[Problem]:
    """Yield the files that are not as listed.

    Args:
        folder: folder of the stage.
        listing: see :func:`read_listing`.
        contents: read every file; otherwise only lengths are checked.
    """
    for name, (size, digest) in listing.items():
        path = folder / name
        try:
            found = path.stat().st_size
        except OSError:
            yield Problem(name, "missing")
            continue
        if found != size:
            yield Problem(name, "cut" if found < size else "altered")
        elif contents and digest_file(path) != digest:
            yield Problem(name, "altered")


def remove_damaged(folder: Path, listing: Listing) -> list[Problem]:
    """Remove files whose length is not as listed, so that the stage can write them again."""
    problems = list(find_problems(folder, listing, contents=False))
    for problem in problems:
        remove(folder / problem.file)
    return problems


def require_intact(folder: Path) -> None:
    """Check, before another stage reads it, that a finished stage's output is unaltered.

    Raises:
        InvDiffError: naming the first file that is altered.
    """
    record = read_record(folder / RECORD)
    listing = None if record is None else read_listing(folder, record)
    if listing is None:
        return
    problems = list(find_problems(folder, listing, contents=True))
    if problems:
        first, others = problems[0], len(problems) - 1
        more = f" (and {others} other files)" if others else ""
        raise InvDiffError(
            f"{folder / first.file} is {first.what} since its stage wrote it{more}: restore it, or "
            f"remove the folder {folder} and run the same command again, which repeats the stage."
        )


def refresh(folder: Path) -> None:
    """List a finished stage's files anew, after its command has been run again by hand."""
    record = read_record(folder / RECORD)
    if record is not None and "files" in record:
        write_record(folder / RECORD, {**record, "files": write_listing(folder)})
