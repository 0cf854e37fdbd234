"""Locks between processes: one run a run folder, one builder a cache folder.

They are filelock's. The kernel's own lets go however its holder ends, so a killed run leaves none
behind; on file systems without such locks a marker file takes its place, which is stale once the
process that it names is gone.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from invdiff_pl.utils.errors import InvDiffError

LOCK = ".lock"
MARKER = ".lock.held"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# Longer than a stage has to tidy up once its parent is gone.
_ORPHAN_SECONDS = 90.0


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder, as its lock file tells people.

    Attributes:
        pid: process number.
        host: name of its machine.
        since: when it took the lock.
        command: what it runs.
    """

    pid: int
    host: str
    since: str
    command: str

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """The holder that a lock file names; ``None`` if it names none, or is damaged."""
        try:
            holder = cls(**json.loads(path.read_bytes()))
            return holder if isinstance(holder.pid, int) and holder.pid > 0 else None
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; one on another machine never is."""
        try:
            if self.host == socket.gethostname():
                os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since}: {self.command})"


@contextmanager
def run_lock(run_dir: Path, command: str) -> Iterator[int]:
    """Hold a run folder, so that no second run writes to it.

    Args:
        run_dir: created if it is not there.
        command: told to whoever comes second.

    Yields:
        the lock's file descriptor, to be handed to child processes: the folder stays locked until
        the last of them has ended.

    Raises:
        InvDiffError: if another run holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    earlier = Holder.read(path)
    lent: list[int] = []
    try:
        held = _take_after(run_dir, earlier, lent)
    except Timeout:
        marker = run_dir / MARKER
        raise InvDiffError(
            f"{run_dir} is in use by {earlier or 'another process'}: wait for it to end, or give "
            "another folder with RUN_DIR= (--run-dir). If that process is gone for certain, "
            f"delete {marker if marker.exists() else path}."
        ) from None
    with held, path.open() as unlocked:
        if earlier is not None:
            print(f"an earlier run was killed here: {earlier}", flush=True)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = Holder(os.getpid(), socket.gethostname(), since, command)
        path.write_text(json.dumps(asdict(holder)))
        try:
            yield lent[0] if lent else unlocked.fileno()
        finally:
            path.write_text("")


def _take_after(
    run_dir: Path, earlier: Holder | None, lent: list[int]
) -> AbstractContextManager[object]:
    """Lock a run folder; of a killed run what is left of its stages is waited for."""
    try:
        return _take(run_dir, 0, lent)
    except Timeout:
        if earlier is None or not earlier.is_gone():
            raise
        print(f"waiting for what is left of {earlier} to end", flush=True)
        return _take(run_dir, _ORPHAN_SECONDS, lent)


def _take(run_dir: Path, seconds: float, lent: list[int]) -> AbstractContextManager[object]:
    lock = FileLock(run_dir / LOCK, on_acquired=lent.append)
    try:
        return lock.acquire(timeout=seconds)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # nor is that of a Timeout
            raise
        (run_dir / LOCK).touch()
        return SoftFileLock(run_dir / MARKER).acquire(timeout=seconds)


@contextmanager
def build_lock(folder: Path, what: str) -> Iterator[None]:
    """Let one process at a time fill a cache folder; the next finds it filled.

    Where the file system has no locks both fill it: files are written aside and renamed, so that
    costs time and nothing else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{what}: waiting for another run that is at it", flush=True)
            lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()
