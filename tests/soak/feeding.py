"""Feeding a reader one damaged file."""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import mutations

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_folder

_SECONDS = 60


@dataclass(frozen=True)
class Target:
    """A reader and what it reads.

    Attributes:
        kind: of the input, to be counted by.
        make: writes healthy files into an empty folder.
        read: reads them; may refuse with an InvDiffError, and nothing else.
        files: pattern of the files that are damaged.
        how: ways to damage them.
        writes: whether reading may write into the folder.
        cost: how much longer than the others it takes; fewer inputs are tried.
    """

    kind: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: str
    how: tuple[mutations.Mutation, ...] = (mutations.at_random,)
    writes: bool = False
    cost: int = 1


class HangError(Exception):
    """A reader took too long."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise :class:`HangError` after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError(f"no answer after {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def feed(target: Target, healthy: Path, folder: Path, seed: int) -> bool:
    """Damage one file and read.

    Returns:
        whether it was read; it was refused otherwise.

    Raises:
        AssertionError: if the reader failed in any other way, hung or changed a file.
    """
    source = random.Random(seed)
    shutil.copytree(healthy, folder)
    path = source.choice(sorted(path for path in folder.glob(target.files) if path.is_file()))
    path.write_bytes(source.choice(target.how)(path.read_bytes(), source))
    before = digest_folder(folder)
    what = f"{target.kind}, seed {seed}, file {path.relative_to(folder)} in {folder}"
    try:
        with limited(_SECONDS):
            target.read(folder)
        read = True
    except InvDiffError:
        read = False
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert target.writes or digest_folder(folder) == before, f"{what}: a file was changed"
    for path in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(path)
    return read
