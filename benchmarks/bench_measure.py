"""Timing, peak memory and floating-point operations, for the benchmarks."""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from invdiff_pl.utils.processes import peak_memory

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Comparison:
    """Two ways of doing the same, timed in turn.

    Attributes:
        first: seconds of each round of the first.
        second: seconds of each round of the second.
    """

    first: list[float]
    second: list[float]

    def ratios(self, work: float = 1.0) -> tuple[float, float, float]:
        """Return the lowest, median and highest ratio of speeds by round, second over first.

        Args:
            work: how many times as much the second does in a round.
        """
        found = [work * a / b for a, b in zip(self.first, self.second, strict=True)]
        return min(found), statistics.median(found), max(found)


def interleaved(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int,
    clock: Callable[[], float],
    device: torch.device,
) -> Comparison:
    """Time two functions in turn, so that a busy machine slows both; the first round warms up.

    Every other round begins with the second.
    """
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds[which].append(timed((first, second)[which], clock, device))
    return Comparison(seconds[0][1:], seconds[1][1:])


def timed(work: Callable[[], object], clock: Callable[[], float], device: torch.device) -> float:
    """Return the seconds of one call, with all that it queued on the device."""
    settle(device)
    started = clock()
    work()
    settle(device)
    return clock() - started


def settle(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(
    dtype: torch.dtype, clock: Callable[[], float], device: torch.device, side: int = 0
) -> float:
    """Measure the operations per second of a square matrix product, the best of ten."""
    side = side or (8192 if device.type == "cuda" else 1024)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = min(timed(lambda: left @ right, clock, device) for _ in range(10))
    return 2 * side**3 / seconds


def peak_mib(device: torch.device) -> float:
    """Return this process's peak memory so far in MiB: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = peak_memory() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20


def peak_of_child(script: str, arguments: Sequence[str]) -> float:
    """Return the peak memory in MiB that a child process prints last.

    A peak never goes down, so in this process what ran before would count, too.

    Raises:
        RuntimeError: if the child failed, with its errors.
    """
    words = [sys.executable, script, *arguments]
    child = subprocess.run(words, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {child.stderr[-2000:]}")
    return float(child.stdout.split()[-1])


def parameters(module: nn.Module) -> int:
    """Count a module's parameters."""
    return sum(value.numel() for value in module.parameters())
