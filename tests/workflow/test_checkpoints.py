"""Checkpoints: whole or not at all, and never code."""

import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.workflow.checkpoints import SafeCheckpointIO


class _Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    weights = torch.arange(6.0).reshape(2, 3)
    content = {"state_dict": {"w": weights}, "global_step": 7}
    SafeCheckpointIO().save_checkpoint(content, tmp_path / "last.ckpt")
    found = SafeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert found["global_step"] == 7
    assert torch.equal(found["state_dict"]["w"], weights)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_wrong_bit_in_the_weights_or_a_missing_end_is_noticed(damage, tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"w": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 if damage == "cut" else 0 :]
    path.write_bytes(content)
    with pytest.raises(InvDiffError, match=r"last\.ckpt"):
        SafeCheckpointIO().load_checkpoint(path)


def test_code_in_a_checkpoint_is_refused_even_if_asked_for(tmp_path: Path) -> None:
    mark = tmp_path / "code ran"
    for path, write in (
        (tmp_path / "zip.ckpt", lambda p: torch.save({"x": _Malicious(mark)}, p)),
        (tmp_path / "plain.ckpt", lambda p: p.write_bytes(pickle.dumps(_Malicious(mark)))),
    ):
        write(path)
        with pytest.raises(InvDiffError, match=path.name):
            SafeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not mark.exists()


def test_a_failed_write_leaves_the_checkpoint_from_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"step": 1}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*last\.ckpt"):
            SafeCheckpointIO().save_checkpoint({"step": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
