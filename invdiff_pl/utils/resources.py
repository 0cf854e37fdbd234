"""Free memory and disk space.

This module does not import Lightning. Sizes are in bytes, and printed in binary units (1 GiB =
1024³ bytes).
"""

import re
import shutil
from pathlib import Path

import torch

from invdiff_pl.utils.errors import InvDiffError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are still free on a device; ``None`` if that is unknown.

    On the CPU that is what the system can provide without swapping, within the limit of the
    process's control group.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    free = 1024 * _number("MemAvailable:", _MEMINFO.read_text())
    try:
        limit, used = (int((_CGROUP / f"memory.{n}").read_text()) for n in ("max", "current"))
        cached = _number("inactive_file", (_CGROUP / "memory.stat").read_text())
    except (OSError, ValueError):  # there is no group, or no limit
        return free
    return min(free, limit - used + cached)  # caches are given up


def _number(name: str, text: str) -> int:
    """Return the number after a name; 0 if there is none."""
    found = re.search(rf"^{name}\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def require_room(folder: Path, size: int, what: str) -> None:
    """Refuse to start writing what will not fit on a folder's disk.

    Args:
        folder: folder to write to; it need not exist yet.
        size: number of bytes to write.
        what: what they are, in the plural.

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


def in_units(size: float) -> str:
    """Format bytes in binary units, such as ``1.5 GiB``."""
    power = next((n for n in range(3) if abs(size) < 1024 ** (n + 1)), 3)
    unit = ("B", "KiB", "MiB", "GiB")[power]
    return f"{size / 1024**power:.{min(power, 1)}f} {unit}"
