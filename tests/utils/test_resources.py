"""Plans against numbers counted by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from invdiff_pl.utils import resources as plan
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.resources import (
    PeakMemory,
    Plan,
    activations,
    free_memory,
    in_units,
    place_for,
    require_room,
    weights_of,
)

CPU = torch.device("cpu")


def test_the_peak_is_of_what_lives_at_once() -> None:
    given = torch.zeros(1000)
    with PeakMemory() as memory:
        first = given + 1  # 4000 bytes
        second = first * 2  # 8000 alive
        assert memory.peak == 8000
        del first  # 4000
        third = second.view(10, 100)  # the same storage
        fourth = third.repeat(1, 3)  # 4000 + 12000
        del second, third, fourth
        _ = given.add_(1)  # its own storage
    assert memory.peak == 16000


def test_the_peak_of_a_backward_pass_holds_what_was_saved_and_the_gradients() -> None:
    weights = torch.ones(100, requires_grad=True)
    with PeakMemory() as memory:
        # exp saves its result (400 bytes); the sum and its gradient are 4 each; the gradient of
        # the product is 400 (the sum's gradient is expanded without a copy).
        loss = weights.exp().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.shape == (100,)
    assert memory.peak == 400 + 4 + 4 + 400


def test_activations_grow_in_proportion_to_the_batch() -> None:
    def run(count: int) -> None:
        kept = torch.zeros(25), torch.zeros(count, 100)
        del kept

    assert activations(run, 1) == 100 + 400
    assert activations(run, 8) == 100 + 8 * 400


def test_trained_and_frozen_weights_are_counted_once_each() -> None:
    network = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))  # 220 and 105 parameters
    trained = list(network[1].parameters())
    assert weights_of([network, network[0]], trained) == (105 * 4, 220 * 4)
    assert weights_of([network], trained, torch.bfloat16) == (105 * 4, 220 * 2)
    assert weights_of([network]) == (0, 325 * 4)


def test_a_plan_adds_up_and_tells_every_part() -> None:
    mib = 1 << 20
    told = Plan(
        stage="adapter",
        device="cuda:0",
        weights_trained=16 * mib,
        weights_frozen=1640 * mib,
        gradients=16 * mib,
        optimizer=32 * mib,
        average=16 * mib,
        cache=600 * mib,
        activations=2048 * mib,
        batch=16,
        available=8192 * mib,
    )
    assert told.total == 4368 * mib
    told.require_fit("use less")
    lines = told.lines()
    assert lines[0] == "memory of stage adapter on cuda:0:"
    assert any("activations of 16 samples" in line and "2.0 GiB" in line for line in lines)
    assert "4.3 GiB of 8.0 GiB" in lines[-1]


def test_what_cannot_fit_is_refused_in_one_line_with_the_numbers_and_the_remedy() -> None:
    told = Plan("adapter", "cpu", 1 << 30, 1 << 31, activations=1 << 30, available=3 << 30, batch=4)
    with pytest.raises(InvDiffError) as refused:
        told.require_fit("lower --scale.local_batch")
    assert str(refused.value) == (
        "stage adapter cannot fit on cpu: it needs about 4.0 GiB (1.0 GiB of them activations of "
        "4 samples), and 3.0 GiB are free: lower --scale.local_batch."
    )
    Plan("adapter", "cpu", 1 << 30, 1 << 31, available=None).require_fit("")


def test_free_memory_is_what_the_system_can_give_within_the_control_groups_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  600 kB\n")
    monkeypatch.setattr(plan, "_MEMINFO", meminfo)
    monkeypatch.setattr(plan, "_CGROUP", tmp_path)
    assert free_memory(CPU) == 600 * 1024
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("200000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 50000\n")
    assert free_memory(CPU) == 350_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) == 600 * 1024
    monkeypatch.setattr(plan, "_MEMINFO", tmp_path / "absent")
    assert free_memory(CPU) is None


@pytest.mark.parametrize(
    ("size", "residence", "device", "processes", "place"),
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
    size, residence, device, processes, place, monkeypatch
) -> None:
    free = {"cuda": 100, "cpu": 400}
    monkeypatch.setattr(plan, "free_memory", lambda where: free[where.type])
    found = place_for(size, residence, torch.device(device), processes)
    assert found == (None if place is None else torch.device(place))


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    require_room(tmp_path / "new" / "folder", 1 << 30, "the latents of 8 images")
    with pytest.raises(InvDiffError, match=r"latents of 8 images do not fit .* 2\.0 GiB, and 1\.0"):
        require_room(tmp_path / "new" / "folder", 2 << 30, "the latents of 8 images")
    assert not (tmp_path / "new").exists()


def test_sizes_are_told_in_readable_units() -> None:
    assert [in_units(n) for n in (7, 1536, 5 << 20, 3 << 40)] == [
        "7 B", "1.5 KiB", "5.0 MiB", "3072.0 GiB",
    ]  # fmt: skip
