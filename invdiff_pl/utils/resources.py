"""What a stage will take, before it takes it: memory of the device, room on the disk, time.

Knows nothing of Lightning. Sizes are in bytes and told in binary units (1 GiB = 1024³ bytes).
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from invdiff_pl.utils.errors import InvDiffError

Residence = Literal["auto", "device", "memory", "disk"]
RESIDENCES = ("auto", "device", "memory", "disk")
# `auto` holds a cache where it takes at most this part of what is free: the rest is for training.
RESIDENT_SHARE = 0.25
# AdamW keeps two moments of each trained weight in float32, the moving average a copy of it.
ADAMW_COPIES = 2
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Plan:
    """What a stage holds on one device at its peak, and writes.

    Attributes:
        stage: its name.
        device: as torch calls it.
        weights_trained: of the trained parameters.
        weights_frozen: of all others.
        gradients: of the trained parameters.
        optimizer: its state.
        average: the moving average's copy.
        cache: what of the cache is held on the device.
        activations: at the peak of a pass, without all of the above.
        batch: samples a device and pass.
        available: of the device, before anything is put there; ``None`` if it cannot be told.
    """

    stage: str
    device: str
    weights_trained: int
    weights_frozen: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    cache: int = 0
    activations: int = 0
    batch: int = 1
    available: int | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.weights_trained
            + self.weights_frozen
            + self.gradients
            + self.optimizer
            + self.average
            + self.cache
            + self.activations
        )

    def require_fit(self, remedy: str) -> None:
        """Refuse what cannot fit.

        Raises:
            InvDiffError: naming stage, device, what is needed and what there is.
        """
        if self.available is not None and self.total > self.available:
            raise InvDiffError(
                f"stage {self.stage} cannot fit on {self.device}: it needs about "
                f"{in_units(self.total)} ({in_units(self.activations)} of them activations of "
                f"{self.batch} samples), and {in_units(self.available)} are free: {remedy}."
            )

    def lines(self) -> list[str]:
        """The plan for the terminal, a line a kind of memory."""
        free = "unknown" if self.available is None else in_units(self.available)
        parts = (
            ("weights, trained", self.weights_trained),
            ("weights, frozen", self.weights_frozen),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("moving average", self.average),
            ("cache held", self.cache),
            (f"activations of {self.batch} samples", self.activations),
        )
        told = [f"  {name:<28}{in_units(size):>12}" for name, size in parts if size]
        return [
            f"memory of stage {self.stage} on {self.device}:",
            *told,
            f"  {'in all, of what is free':<28}{in_units(self.total):>12} of {free}",
        ]


def weights_of(
    modules: Iterable[nn.Module], trained: Iterable[Tensor] = (), frozen_dtype: Any = None
) -> tuple[int, int]:
    """Bytes of trained and of frozen parameters, each counted once.

    Args:
        modules: that hold them.
        trained: those that are trained.
        frozen_dtype: in which the frozen ones will be held; as they are if not given.
    """
    own = {id(value): value for value in trained}
    rest = {id(p): p for module in modules for p in module.parameters() if id(p) not in own}

    def size(value: Tensor) -> int:
        itemsize = frozen_dtype.itemsize if frozen_dtype is not None else value.element_size()
        return value.numel() * int(itemsize)

    return sum(value.nbytes for value in own.values()), sum(map(size, rest.values()))


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that come to be while it is entered, and their peak.

    Whatever the device, what an operation allocates for itself and frees before it returns is not
    seen, nor what an allocator loses between blocks.

    Attributes:
        peak: largest number of bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take note of storages that are new."""
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._take(storage)
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def activations(run: Callable[[int], object], batch: int) -> int:
    """Peak bytes of a pass over ``batch`` samples, from passes over one and over two.

    What grows with the batch grows in proportion to it.

    Args:
        run: makes a pass over so many samples: forward, and backward where there is one.
        batch: samples.
    """
    peaks = []
    for count in (1, 2):
        with PeakMemory() as memory:
            run(count)
        peaks.append(memory.peak)
    first, second = peaks
    return first + (batch - 1) * max(0, second - first)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; ``None`` where that cannot be told.

    On the CPU that is what the system can give without swapping, within the limit of the process's
    control group.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    return min([free, *_cgroup_room()])


def _cgroup_room() -> list[int]:
    """What the control group's limit leaves, if there is a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines() if line
        )
    except (OSError, ValueError):
        return []
    if limit == "max":
        return []
    return [int(limit) - used + int(stat.get("inactive_file", 0))]  # caches are given up


def place_for(
    size: int, residence: Residence, device: torch.device, processes: int = 1
) -> torch.device | None:
    """Where a cache is held: on the device, in the host's memory, or (``None``) on the disk.

    Args:
        size: of the cache, bytes.
        residence: ``device``, ``memory`` or ``disk``; or ``auto``, the first of them where it takes
            at most a quarter of what is free.
        device: that trains.
        processes: of this machine that share its memory, each with a copy.
    """
    host = torch.device("cpu")
    if residence == "disk":
        return None
    if residence == "device":
        return device
    if residence == "memory":
        return host
    for place, copies in ((device, 1 if device.type == "cuda" else processes), (host, processes)):
        free = free_memory(place)
        if free is not None and size * copies <= RESIDENT_SHARE * free:
            return place
    return None


def require_room(folder: Path, size: int, what: str) -> None:
    """Refuse to start writing what will not fit on a folder's disk.

    Args:
        folder: that will be written to; it need not exist yet.
        size: bytes that will be written.
        what: they are, in the plural.

    Raises:
        InvDiffError: naming what is needed and what is free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise InvDiffError(
            f"{what} do not fit into {folder}: they take {in_units(size)}, and {in_units(free)} "
            "are free on its disk: make room, or give a folder elsewhere."
        )


def image_bytes(shape: Iterable[int]) -> int:
    """Most bytes of a PNG file of an image ``[3, H, W]``: its pixels, uncompressed."""
    return prod(shape)


def in_units(size: float) -> str:
    """Bytes in binary units: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
