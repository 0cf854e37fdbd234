"""What there is of memory and of room on a disk, and where a cache is held.

Knows nothing of Lightning. Sizes are in bytes and told in binary units (1 GiB = 1024³ bytes).
"""

import shutil
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Literal

import torch

from invdiff_pl.utils.errors import InvDiffError

LatentDevice = Literal["auto", "device", "memory", "disk"]
RESIDENCES = ("auto", "device", "memory", "disk")
# `auto` holds a cache where it takes at most this part of what is free: the rest is for training.
RESIDENT_SHARE = 0.25
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


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
    size: int, latent_device: LatentDevice, device: torch.device, processes: int = 1
) -> torch.device | None:
    """Where a cache is held: on the device, in the host's memory, or (``None``) on the disk.

    Args:
        size: of the cache, bytes.
        latent_device: ``device``, ``memory`` or ``disk``; or ``auto``, the first of them where it
            takes at most a quarter of what is free.
        device: that trains.
        processes: of this machine that share its memory, each with a copy.
    """
    host = torch.device("cpu")
    if latent_device == "disk":
        return None
    if latent_device == "device":
        return device
    if latent_device == "memory":
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
