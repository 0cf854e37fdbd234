"""Room in memory and on the disk."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from invdiff_pl.data import placement
from invdiff_pl.data.placement import place_for
from invdiff_pl.utils import resources
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.resources import (
    free_memory,
    in_units,
    require_room,
)

CPU = torch.device("cpu")


def test_free_memory_is_what_the_system_can_give_within_the_control_groups_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  600 kB\n")
    monkeypatch.setattr(resources, "_MEMINFO", meminfo)
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    assert free_memory(CPU) == 600 * 1024
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("200000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 50000\n")
    assert free_memory(CPU) == 350_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) == 600 * 1024
    monkeypatch.setattr(resources, "_MEMINFO", tmp_path / "absent")
    assert free_memory(CPU) is None


@pytest.mark.parametrize(
    ("size", "latent_device", "device", "processes", "place"),
    [
        (25, "auto", "cuda", 8, "cuda"),  # a quarter of the device's 100
        (26, "auto", "cuda", 1, "cpu"),  # a quarter of the host's 400
        (26, "auto", "cuda", 8, None),  # eight copies do not fit there
        (101, "auto", "cuda", 1, None),
        (100, "auto", "cpu", 1, "cpu"),
        (1 << 40, "device", "cuda", 1, "cuda"),
        (1 << 40, "memory", "cuda", 1, "cpu"),
        (1, "disk", "cuda", 1, None),
    ],
)
def test_a_cache_is_held_where_it_fits(
    size, latent_device, device, processes, place, monkeypatch
) -> None:
    free = {"cuda": 100, "cpu": 400}
    monkeypatch.setattr(placement, "free_memory", lambda where: free[where.type])
    found = place_for(size, latent_device, torch.device(device), processes)
    assert found == (None if place is None else torch.device(place))


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    require_room(tmp_path / "new" / "folder", 1 << 30, "the latents of 8 images")
    with pytest.raises(InvDiffError, match=r"latents of 8 images do not fit .* 2\.0 GiB, and 1\.0"):
        require_room(tmp_path / "new" / "folder", 2 << 30, "the latents of 8 images")
    assert not (tmp_path / "new").exists()


def test_sizes_are_told_in_readable_units() -> None:
    assert [in_units(n) for n in (7, 1536, 5 << 20, 3 << 40)] == [
        "7 B", "1.5 KiB", "5.0 MiB", "3072.0 GiB",
    ]  # fmt: skip
