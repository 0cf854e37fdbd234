"""Files of a run."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from invdiff_pl.utils.files import is_file, is_folder, sort_safetensors_header


def test_a_sorted_header_keeps_tensors_and_metadata_and_forgets_their_order(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([7], dtype=torch.int64)}
    metadata = {name: f"value of {name}" for name in "zyxwvutsr"}
    file = tmp_path / "weights.safetensors"
    save_file(tensors, file, metadata)
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    turned = json.dumps(dict(reversed(header.items()))).encode()
    other = tmp_path / "other.safetensors"
    other.write_bytes(len(turned).to_bytes(8, "little") + turned + content[start:])

    sort_safetensors_header(file)
    sort_safetensors_header(other)

    assert file.read_bytes() == other.read_bytes()
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == metadata
        assert {n: stored.get_tensor(n).tolist() for n in tensors} == {
            n: value.tolist() for n, value in tensors.items()
        }


def test_there_is_no_file_or_folder_of_a_name_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_file(tmp_path / "file")
    assert is_folder(tmp_path)
    for name in ("x" * 300, "x/" * 5000):
        assert not is_file(tmp_path / name)
        assert not is_folder(tmp_path / name)
