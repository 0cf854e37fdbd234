"""Stages as child processes: signals, and no child left behind."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning import Trainer

from invdiff_pl.utils import processes

# A stage that tidies up on SIGTERM, or is deaf to it.
STAGE = """
import pathlib, signal, sys, time
from invdiff_pl.utils.processes import end_with_parent, raising_on_sigterm
folder = pathlib.Path(sys.argv[1])
end_with_parent()
with raising_on_sigterm():
    if "deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "begun").touch()
    try:
        time.sleep(60)
    finally:
        (folder / "tidied").touch()
"""
PARENT = """
import os, sys
from invdiff_pl.utils import processes
processes._GRACE_SECONDS = 1.0
lock = os.open(sys.argv[1], os.O_RDONLY)
processes.call([sys.executable, "-c", sys.argv[2], *sys.argv[1:2], *sys.argv[3:]], lock, tied=True)
"""


def _run(folder: Path, *more: str) -> subprocess.Popen:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder), STAGE, *more])
    _wait(folder / "begun")
    return parent


def _wait(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} did not come")


def test_sigterm_is_passed_on_and_the_stage_tidies_up(tmp_path: Path) -> None:
    parent = _run(tmp_path)
    parent.terminate()
    assert parent.wait(30) == processes.TERMINATED
    assert (tmp_path / "tidied").exists()


def test_a_stage_that_is_deaf_to_sigterm_is_killed(tmp_path: Path) -> None:
    parent = _run(tmp_path, "deaf")
    parent.terminate()
    assert parent.wait(30) == processes.TERMINATED
    assert not (tmp_path / "tidied").exists()


def test_a_stage_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = _run(tmp_path)
    parent.kill()
    parent.wait()
    _wait(tmp_path / "tidied")


def test_a_status_is_handed_on(tmp_path: Path) -> None:
    lock = os.open(tmp_path, os.O_RDONLY)
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    assert processes.call(command, lock, tied=False).status == 7
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert processes.call(killed, lock, tied=True).status == -signal.SIGKILL


HELD = """
import sys
from invdiff_pl.utils.processes import end_with_parent
end_with_parent()
held = bytearray(b"1") * (200 << 20)
del held
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
@pytest.mark.parametrize("status", ["0", "2"])
def test_a_stage_tells_the_peak_of_its_own_memory(tmp_path: Path, status: str) -> None:
    lock = os.open(tmp_path, os.O_RDONLY)
    kept = bytearray(b"1") * (800 << 20)  # the parent's does not count
    ended = processes.call([sys.executable, "-c", HELD, status], lock, tied=True)
    assert ended.status == int(status)
    assert ended.peak_memory is not None
    assert 200 << 20 < ended.peak_memory < 300 << 20
    del kept
    assert processes.call(["true"], lock, tied=False).peak_memory is None


# Pages that the kernel had to hand out while 8 MiB were taken and freed a hundred times.
FAULTS = """
import pathlib, resource, sys
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        bytearray(b"1") * (1 << 23)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
pathlib.Path(sys.argv[1]).write_text(str(after - before))
"""


def _faults(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    command = [sys.executable, "-c", FAULTS, str(folder / "faults")]
    assert processes.call(command, lock, tied=False).status == 0
    return int((folder / "faults").read_text())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_a_stage_uses_freed_memory_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert _faults(tmp_path) < 100
    # A user's own settings win: these give every tensor back to the kernel.
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")
    assert _faults(tmp_path) > 10_000


@pytest.mark.parametrize(
    ("variables", "devices", "hidden"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "jupyter", "SLURM_PROCID": "0"}, 1, True),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, 1, True),
        ({"SLURM_NTASKS": "1"}, 8, True),
        ({"SLURM_NTASKS": "1"}, 1, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, 4, False),
        ({}, 1, True),
    ],
)
def test_slurm_is_hidden_where_it_has_started_no_other_process(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], devices: int, hidden: bool
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.hide_idle_slurm(devices)
    assert SLURMEnvironment.detect() is not hidden


def test_a_jupyter_job_of_four_tasks_trains_in_one_process(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "jupyter")
    with pytest.raises(RuntimeError, match="ntasks"):
        Trainer(accelerator="cpu", devices=1, logger=False)
    processes.hide_idle_slurm(devices=1)
    assert Trainer(accelerator="cpu", devices=1, logger=False).world_size == 1
