"""Features of one's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from invdiff_pl.environments.given_features import read_features
from invdiff_pl.utils.errors import InvDiffError


def test_features_of_ones_own_are_read_from_either_kind_of_file(tmp_path: Path) -> None:
    values = torch.randn(5, 3)
    np.save(tmp_path / "own.npy", values.numpy())
    save_file({"clip": values}, tmp_path / "own.safetensors")
    assert torch.equal(read_features(tmp_path / "own.npy", 5), values)
    assert torch.equal(read_features(tmp_path / "own.safetensors", 5), values)


def test_a_file_that_holds_something_else_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.zeros((4, 3), np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((5, 3), np.int64))
    healthy = (tmp_path / "whole.npy").read_bytes()
    damages = {"open": (b"}", b"("), "negative": (b"(5, 3)", b"(-5,3)"), "type": (b"<i8'", b"()  ")}
    for name, (old, new) in damages.items():
        (tmp_path / f"{name}.npy").write_bytes(healthy.replace(old, new))
    (tmp_path / "archive.npy").write_bytes(b"PK\x03\x04 and no more")
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    for name, message in (
        ("long.npy", r"found float32 of shape \[4, 3\]; expected floats \[5, D\]"),
        ("whole.npy", r"found int64 of shape \[5, 3\]"),
        ("objects.npy", "cannot be read"),
        ("open.npy", "cannot be read"),
        ("negative.npy", "cannot be read"),
        ("type.npy", "cannot be read"),
        ("archive.npy", "cannot be read"),
        ("cut.safetensors", "cannot be read"),
        ("two.safetensors", "cannot be read"),
        ("none.npy", "expected block, or an existing file"),
        ("x" * 300 + ".npy", "expected block, or an existing file"),
        ("blocks", "expected block, or an existing file"),
    ):
        with pytest.raises(InvDiffError, match=message):
            read_features(tmp_path / name, 5, instead=["block"])
