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
    header = (tmp_path / "whole.npy").read_bytes().replace(b"}", b"(")
    (tmp_path / "header.npy").write_bytes(header)
    np.save(tmp_path / "nan.npy", np.diag([1, 1, 1, np.nan, 1]))
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    for name, message in (
        ("long.npy", r"found float32 of shape \[4, 3\]; expected floats \[5, D\]"),
        ("whole.npy", r"found int64 of shape \[5, 3\]"),
        ("objects.npy", "cannot be read"),
        ("header.npy", "cannot be read"),
        ("nan.npy", "the row of image 3 .counted from 0. holds NaN or infinity"),
        ("cut.safetensors", "cannot be read"),
        ("two.safetensors", "cannot be read"),
        ("none.npy", "expected block, losses, or an existing file"),
        ("blocks", "expected block, losses, or an existing file"),
    ):
        with pytest.raises(InvDiffError, match=message):
            read_features(tmp_path / name, 5)
