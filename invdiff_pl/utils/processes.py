"""Running stages as child processes that get the parent's signals and do not outlive it."""

import atexit
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

# Names the socket whose other end the parent holds: when it closes, because the run was killed, the
# stage ends, too; a stage that ends normally sends its peak memory through it.
_LIFELINE = "INVDIFF_LIFELINE"
# Set if the parent holds the run folder's lock.
LOCKED = "INVDIFF_RUN_LOCKED"
TERMINATED = 128 + signal.SIGTERM
# Settings of glibc's allocator for a stage: freed tensors are kept for the next ones rather than
# handed back to the kernel and faulted in again, page by page, and pages are large ones where the
# system offers them. Results stay the same; unknown settings are ignored.
_ALLOCATOR = {
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.malloc.hugetlb=1",
            f"glibc.malloc.trim_threshold={4 << 30}",
            f"glibc.malloc.mmap_threshold={32 << 20}",
        )
    )
}
_GRACE_SECONDS = 60.0
_STATUS = Path("/proc/self/status")


class Terminated(SystemExit):
    """Raised when SIGTERM arrives, so that the stack unwinds and partial files are removed."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class _Sigterm:
    """The handler of SIGTERM; while deferred, only a second signal ends the process at once."""

    deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred:
            raise Terminated
        self.deferred = False


_handler = _Sigterm()


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise :class:`Terminated` in the main thread; Lightning keeps this handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _handler)
    try:
        yield
    finally:
        _handler.deferred = False
        signal.signal(signal.SIGTERM, previous)


def defer_sigterm(deferred: bool) -> None:
    """Leave SIGTERM to a callback that looks for it between steps, or stop doing so."""
    _handler.deferred = deferred


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended.

    Attributes:
        status: exit status; negative for a signal.
        peak_memory: largest number of bytes resident at once; ``None`` if unknown.
    """

    status: int
    peak_memory: int | None = None


def peak_memory() -> int | None:
    """Return the largest number of this process's bytes resident at once; ``None`` but on Linux.

    ``getrusage`` would start from the parent's peak, which even another program inherits.
    """
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


def call(command: Sequence[str], lock: int, *, tied: bool) -> Ended:
    """Run a stage and wait for it.

    SIGTERM is passed on, and the stage is killed if it has not ended a minute later. Ctrl-C reaches
    it anyway, from the terminal. The C library's allocator is set up for large tensors, unless the
    user's GLIBC_TUNABLES says otherwise.

    Args:
        command: program and arguments.
        lock: file descriptor of the run folder's lock, which the child holds, too.
        tied: whether the child ends with this process, even if that is killed; only for a child on
            this machine that calls :func:`end_with_parent`.

    Returns:
        exit status, and the peak memory of a tied child.

    Raises:
        Terminated: once the stage has ended, if SIGTERM arrived meanwhile.
    """
    near, far = socket.socketpair()
    environment = {**_ALLOCATOR, **os.environ, "PYTHONUNBUFFERED": "1", LOCKED: "1"}
    if tied:
        environment[_LIFELINE] = str(far.fileno())
    received = threading.Event()
    try:
        process = subprocess.Popen(
            command, env=environment, pass_fds=(lock, far.fileno()) if tied else (lock,)
        )
        far.close()

        def pass_on(number: int, frame: FrameType | None) -> None:
            received.set()
            process.terminate()

        previous = signal.signal(signal.SIGTERM, pass_on)
        try:
            status = _wait(process, received)
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
        told = _received(near)
    finally:
        near.close()
    if received.is_set():
        raise Terminated
    return Ended(status, int(told) if told.isdigit() else None)


def _received(near: socket.socket) -> bytes:
    near.setblocking(False)
    with suppress(OSError):
        return near.recv(64)
    return b""


def hide_idle_slurm(devices: int) -> None:
    """Hide SLURM's variables from Lightning if this process is the only one that srun has started.

    In a Jupyter or batch job they name all tasks that the job might start. Lightning would take
    this process for the first of them and wait for others that nobody starts, and it would not
    start processes for several devices itself.

    Args:
        devices: number of devices that this machine's processes are to use.
    """
    tasks, started = (
        os.environ.get(name, "1") for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
    )
    if tasks != started or (tasks == "1" and devices > 1):
        os.environ.pop("SLURM_NTASKS", None)


def _wait(process: subprocess.Popen, received: threading.Event) -> int:
    deadline = None
    while True:
        try:
            return process.wait(1.0)
        except subprocess.TimeoutExpired:
            if received.is_set():
                deadline = deadline or time.monotonic() + _GRACE_SECONDS
                if time.monotonic() > deadline:
                    process.kill()


def end_with_parent() -> None:
    """End this process when the caller of :func:`call` is gone; send it the peak memory at exit.

    The process ends as by SIGTERM, so that it can tidy up, or after a minute in any case.
    """
    descriptor = os.environ.pop(_LIFELINE, None)  # not for the processes that this one starts
    if descriptor is None or not descriptor.isdigit():
        return
    os.set_inheritable(int(descriptor), False)

    def watch() -> None:
        os.read(int(descriptor), 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(TERMINATED)

    def tell() -> None:
        with suppress(OSError):  # the parent is gone
            os.write(int(descriptor), str(peak_memory()).encode())

    atexit.register(tell)
    threading.Thread(target=watch, daemon=True, name="parent").start()
