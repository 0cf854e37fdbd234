"""Locks between processes: one run per run folder, one builder per cache folder.

They are filelock's. A kernel lock is released however its holder ends, so a killed run leaves none
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
# More than the time that a stage has to tidy up once its parent is gone.
_ORPHAN_SECONDS = 90.0


@dataclass(frozen=True)
class Holder:
    """The process that holds a run folder, as named in its lock file.

    Attributes:
        pid: process number.
        host: name of the machine.
        since: when the process took the lock.
        command: command that it runs.
    """

    pid: int
    host: str
    since: str
    command: str

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Read the holder from a lock file; ``None`` if it names none, or is damaged."""
        try:
            holder = cls(**json.loads(path.read_bytes()))
            return holder if isinstance(holder.pid, int) and holder.pid > 0 else None
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def is_gone(self) -> bool:
        """Return whether the process is known to have ended; never so on another machine."""
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
        run_dir: the run folder, created if it does not exist.
        command: command to name in the message to a second run.

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
            "another folder with RUN_DIR= (--run-dir). If that process is certainly gone, "
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
    """Lock a run folder; if a run was killed there, wait until its remaining stages have ended."""
    try:
        return _take(run_dir, 0, lent)
    except Timeout:
        if earlier is None or not earlier.is_gone():
            raise
        print(f"waiting for the remaining stages of {earlier} to end", flush=True)
        return _take(run_dir, _ORPHAN_SECONDS, lent)


def _take(run_dir: Path, seconds: float, lent: list[int]) -> AbstractContextManager[object]:
    lock = FileLock(run_dir / LOCK, on_acquired=lent.append)
    try:
        return lock.acquire(timeout=seconds)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # as for a Timeout
            raise
        (run_dir / LOCK).touch()
        return SoftFileLock(run_dir / MARKER).acquire(timeout=seconds)


@contextmanager
def build_lock(folder: Path, what: str) -> Iterator[None]:
    """Let one process at a time fill a cache folder; the next one finds it filled.

    If the file system has no locks, both fill it, which costs time but does no harm: files are
    written aside and renamed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{what}: waiting for another run that is doing the same", flush=True)
            lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()
