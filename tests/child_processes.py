"""Processes as tests use them: ranks that import nothing anew, stages that start none."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch.multiprocessing import start_processes

from invdiff_pl.cli.main import main
from invdiff_pl.utils import processes


def run_ranks(function: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` on so many ranks."""
    start_processes(function, arguments, count, start_method="fork")


@contextmanager
def stages_in_this_process() -> Iterator[None]:
    """Run the stages that Lightning runs here; torch alone takes a new process seconds."""
    in_processes = processes.call

    def call(command: Sequence[str], lock: int, *, tied: bool) -> processes.Ended:
        words = command[command.index("invdiff_pl") + 1 :]
        if words[0] not in ("fit", "predict"):
            return in_processes(command, lock, tied=tied)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(processes.LOCKED, "1")
            return processes.Ended(main(words))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "call", call)
        yield
