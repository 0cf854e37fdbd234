"""Locks: one run a folder, whoever ended how."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.locks import build_lock, run_lock

HOLD = """
import sys, time
from pathlib import Path
from invdiff_pl.utils.locks import run_lock
with run_lock(Path(sys.argv[1]), "train --experiment waterbirds"):
    print("held", flush=True)
    time.sleep(60)
"""


def _holding(folder: Path, script: str = HOLD) -> subprocess.Popen:
    command = [sys.executable, "-c", script, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_who_holds_the_folder_and_a_killed_one_frees_it(
    tmp_path: Path, capsys
) -> None:
    holder = _holding(tmp_path)
    try:
        with pytest.raises(InvDiffError) as refused, run_lock(tmp_path, "second"):
            pass
        message = str(refused.value)
        for part in (f"process {holder.pid}", "train --experiment waterbirds", "RUN_DIR="):
            assert part in message
    finally:
        holder.kill()
        holder.wait()
    with run_lock(tmp_path, "third"):
        assert "an earlier run was killed here" in capsys.readouterr().out
    assert (tmp_path / ".lock").read_text() == ""


def test_a_run_waits_for_what_is_left_of_a_killed_one(tmp_path: Path, capsys) -> None:
    child = "import subprocess; subprocess.Popen(['sleep', '3'], pass_fds=[lock])\n    "
    script = HOLD.replace('"):', '") as lock:')
    script = script.replace('print("held"', child + 'print("held"')
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    with run_lock(tmp_path, "second"):
        assert "waiting for the remaining stages of process" in capsys.readouterr().out


def test_a_folder_is_free_after_a_run_that_failed(tmp_path: Path, capsys) -> None:
    with pytest.raises(ValueError, match="failed"), run_lock(tmp_path, "first"):
        raise ValueError("failed")
    with run_lock(tmp_path, "second"):
        assert capsys.readouterr().out == ""


NO_LOCKS = """
import errno, fcntl

def flock(descriptor, how):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = flock
"""


def test_without_kernel_locks_a_marker_holds_the_folder_while_its_process_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = _holding(tmp_path, NO_LOCKS + HOLD)
    monkeypatch.setattr(fcntl, "flock", lambda *_: _no_locks())
    try:
        with (
            pytest.raises(InvDiffError, match=rf"process {holder.pid} .* delete .*\.lock\.held"),
            run_lock(tmp_path, "second"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with run_lock(tmp_path, "third") as descriptor:
        os.fstat(descriptor)
        assert (tmp_path / ".lock.held").exists()
    assert not (tmp_path / ".lock.held").exists()
    with build_lock(tmp_path, "encoding images"):  # nor is a cache held up
        pass


def _no_locks() -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_damaged_lock_file_names_nobody(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff{")
    with run_lock(tmp_path, "first"):
        assert os.getpid() == json.loads((tmp_path / ".lock").read_text())["pid"]


def test_of_two_builders_the_second_waits(tmp_path: Path, capsys) -> None:
    order: list[str] = []

    def build() -> None:
        with build_lock(tmp_path, "encoding images"):
            order.append("second")

    with build_lock(tmp_path, "encoding images"):
        second = threading.Thread(target=build)
        second.start()
        time.sleep(0.2)
        order.append("first")
    second.join(10)
    assert order == ["first", "second"]
    assert "encoding images: waiting for another run" in capsys.readouterr().out
