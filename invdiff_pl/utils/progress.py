"""Progress of long loops: a bar on a terminal, a line now and then elsewhere.

Under SLURM, in CI, or with ``| tee``, a bar shows nothing; there a line gives the stage, the step
out of how many, and the time left.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from rich import get_console
from rich.progress import Progress as RichProgress

T = TypeVar("T")

EVERY = 30.0
SOON = 5.0


def shows_bars() -> bool:
    """Return whether the output is a terminal or a notebook, where bars can be drawn."""
    return sys.stdout.isatty() or get_console().is_jupyter


@dataclass
class Lines:
    """Writes progress lines for a process's loops, which together write at most one per interval.

    Attributes:
        every: least number of seconds between lines.
        soon: seconds that a loop has run before its first line; shorter loops get none.
        clock: function that returns seconds since a fixed moment.
        write: function that takes a line.
    """

    every: float = EVERY
    soon: float = SOON
    clock: Callable[[], float] = time.monotonic
    write: Callable[[str], object] = field(default=lambda line: print(line, flush=True))
    _next: float = field(default=float("-inf"), init=False)

    def loop(self, what: str, total: int | None, unit: str = "step", done: int = 0) -> "Loop":
        """Start reporting on a loop.

        Args:
            what: what the loop does, or the stage's name.
            total: number of steps; ``None`` if unknown.
            unit: name of a step.
            done: number of steps that an earlier run has done.
        """
        return Loop(self, what, total, unit, done, self.clock())


@dataclass
class Loop:
    """A loop whose progress is reported in lines.

    Attributes:
        lines: writer of the lines.
        what: what the loop does.
        total: number of steps; ``None`` if unknown.
        unit: name of a step.
        told: number of steps done at the last line, or at the start.
        told_at: time of the last line, or of the start.
    """

    lines: Lines
    what: str
    total: int | None
    unit: str
    told: int
    told_at: float

    def reach(self, done: int) -> None:
        """Report the number of steps done, if a line is due."""
        now = self.lines.clock()
        spent = now - self.told_at
        if done <= self.told or spent < self.lines.soon or now < self.lines._next:
            return
        of = "" if self.total is None else f" of {self.total}"
        left = ""
        if self.total is not None and done < self.total:
            # From the latest steps alone, as those that an earlier run has done take no time.
            seconds = spent / (done - self.told) * (self.total - done)
            left = f", about {in_time(seconds)} left"
        self.lines.write(f"{self.what}: {self.unit} {done}{of}{left}")
        self.told, self.told_at, self.lines._next = done, now, now + self.lines.every


def _silent(line: str) -> None:
    """Write nothing, as on all ranks but the first."""


_lines = Lines()
_untold = ContextVar("untold", default=False)


@contextmanager
def untold() -> Iterator[None]:
    """Report on no loop that is started inside."""
    token = _untold.set(True)
    try:
        yield
    finally:
        _untold.reset(token)


def start(what: str, total: int | None, unit: str = "step", done: int = 0) -> Loop:
    """Start reporting on a loop in lines, see :meth:`Lines.loop`; on a terminal there are none.

    Example:
        >>> loop = start("held-out losses", 2, "batch")
        >>> for number in range(2):
        ...     loop.reach(number + 1)
    """
    if shows_bars() or not _first_rank() or _untold.get():
        return Lines(write=_silent).loop(what, total, unit, done)
    return _lines.loop(what, total, unit, done)


@contextmanager
def telling(what: str, total: int | None, unit: str = "step") -> Iterator[Callable[[int], object]]:
    """Report a loop's progress: by a bar on a terminal, in lines elsewhere.

    Args:
        what: what the loop does.
        total: number of steps; ``None`` if unknown.
        unit: name of a step.

    Yields:
        a function to be called with the number of steps done.
    """
    if shows_bars() and _first_rank() and not _untold.get():
        with RichProgress() as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield start(what, total, unit).reach


def track(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "image", bar: bool = True
) -> Iterator[T]:
    """Iterate over items, and report the progress.

    Args:
        items: items to iterate over.
        what: what is done with them.
        total: number of items, if they are not a sequence.
        unit: name of an item.
        bar: whether to draw a bar on a terminal; not beneath another one.

    Example:
        >>> list(track([1, 2], "counting"))
        [1, 2]
    """
    if total is None and isinstance(items, Sequence):
        total = len(items)
    told = telling(what, total, unit) if bar else nullcontext(start(what, total, unit).reach)
    with told as reach:
        for number, item in enumerate(items, start=1):
            yield item
            reach(number)


def _first_rank() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def in_time(seconds: float) -> str:
    """Format seconds as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
