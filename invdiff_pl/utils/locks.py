"""Locks between processes: one run a run folder, one builder a cache folder.

A lock is the kernel's (``flock``), which lets go of it however its holder ends, so a killed run
leaves none behind. Where a file system has no such locks, a file that names its holder takes their
place; it is stale once that process is gone.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from invdiff_pl.utils.errors import InvDiffError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_WAIT_SECONDS = 0.5
# Longer than a stage has to tidy up once its parent is gone.
_ORPHAN_SECONDS = 90.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        pid: process number.
        host: name of its machine.
        started: when the process started, in the kernel's clock; process numbers come again.
        since: when it took the lock, for people.
        command: what it runs.
    """

    pid: int
    host: str
    started: str
    since: str
    command: str

    @classmethod
    def here(cls, command: str) -> "Holder":
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        pid = os.getpid()
        return cls(pid, socket.gethostname(), _started(pid), since, command)

    @classmethod
    def read(cls, descriptor: int) -> "Holder | None":
        """The holder that a lock file names; ``None`` if it names none, or is damaged."""
        try:
            entry = json.loads(os.pread(descriptor, 1 << 16, 0))
            holder = cls(**entry)
        except (ValueError, TypeError, RecursionError):
            return None
        kinds = {"pid": int}
        fields = asdict(holder).items()
        return holder if all(isinstance(v, kinds.get(n, str)) for n, v in fields) else None

    def write(self, descriptor: int) -> None:
        """Name this holder in a lock file."""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(self)).encode(), 0)

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; one on another machine never is."""
        if self.host != socket.gethostname() or self.pid <= 0:
            return self.pid <= 0
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since}: {self.command})"


def _started(pid: int) -> str:
    """Start time of a process since boot, as Linux tells it; empty elsewhere."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


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
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        holder = Holder.read(descriptor)
        if not _take(descriptor, holder) and not _outlast(descriptor, holder):
            raise InvDiffError(
                f"{run_dir} is in use by {holder or 'another process'}: wait for it to end, or "
                f"give another folder with RUN_DIR= (--run-dir). If that process is gone for "
                f"certain, delete {path}."
            )
        if holder is not None:
            print(f"an earlier run was killed here: {holder}", flush=True)
        Holder.here(command).write(descriptor)
        try:
            yield descriptor
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take(descriptor: int, holder: Holder | None) -> bool:
    """Lock an open file without waiting; by what it says if the file system has no locks."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return holder is None or holder.is_gone()


def _outlast(descriptor: int, holder: Holder | None) -> bool:
    """Wait for the stages of a killed run, which end with it but take a moment.

    Returns:
        whether the lock has been taken.
    """
    if holder is None or not holder.is_gone():
        return False
    print(f"waiting for what is left of {holder} to end", flush=True)
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_WAIT_SECONDS)
        if _take(descriptor, holder):
            return True
    return False


@contextmanager
def build_lock(folder: Path, what: str) -> Iterator[None]:
    """Let one process at a time fill a cache folder; the next finds it filled.

    Where the file system has no locks both fill it: files are written aside and renamed, so that
    costs time and nothing else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait(descriptor, what)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, what: str) -> None:
    if fcntl is None:
        return
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                print(f"{what}: waiting for another run that is at it", flush=True)
                told = True
            time.sleep(_WAIT_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return
        else:
            return
