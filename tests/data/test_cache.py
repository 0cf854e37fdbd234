"""Shards against the tensor that they were cut from."""

import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from invdiff_pl.data import cache
from invdiff_pl.data.cache import ResidentTensor, ShardedTensor, build_shards, is_complete
from invdiff_pl.utils.errors import InvDiffError

ROWS = 23


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_ROWS", 5)


def _whole(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(ROWS * 2 * 3 * 4).reshape(ROWS, 2, 3, 4)
    return (values % 256 if dtype == torch.uint8 else values).to(dtype)


def _built(folder: Path, whole: torch.Tensor) -> ShardedTensor:
    build_shards(folder, len(whole), lambda rows: whole[list(rows)], "building")
    return ShardedTensor(folder)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.int64])
def test_gathered_rows_and_variants_are_those_of_the_whole(dtype, tmp_path) -> None:
    whole = _whole(dtype)
    shards = _built(tmp_path, whole)
    assert (len(shards), shards.shape) == (ROWS, (2, 3, 4))
    rows = torch.tensor([22, 0, 7, 7, 4, 5, 19, 0])
    variants = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0])
    assert torch.equal(shards.gather(rows), whole[rows])
    assert torch.equal(shards.gather(rows, variants), whole[rows, variants])
    assert torch.equal(shards.gather(torch.arange(ROWS)), whole)
    assert shards.gather(rows[:0]).shape == (0, 2, 3, 4)


def test_rows_held_in_memory_are_those_of_the_shards(tmp_path) -> None:
    whole = _whole(torch.float16)
    held = ResidentTensor.read(_built(tmp_path, whole), torch.device("cpu"))
    rows, variants = torch.tensor([22, 0, 7, 7]), torch.tensor([0, 1, 1, 0])
    assert (len(held), held.shape, held.nbytes) == (ROWS, (2, 3, 4), whole.nbytes)
    assert torch.equal(held.gather(rows), whole[rows])
    assert torch.equal(held.gather(rows, variants), whole[rows, variants])
    held.gather(rows).zero_()
    assert torch.equal(held.values, whole)
    (tmp_path / "00000.safetensors").unlink()
    assert torch.equal(held.gather(rows), whole[rows])


def test_shards_are_plain_safetensors_files(tmp_path) -> None:
    whole = _whole(torch.float16)
    _built(tmp_path, whole)
    assert torch.equal(load_file(tmp_path / "00004.safetensors")["values"], whole[20:])


def test_shards_travel_to_worker_processes(tmp_path) -> None:
    shards = _built(tmp_path, _whole(torch.uint8))
    rows = torch.tensor([3, 21])
    assert torch.equal(pickle.loads(pickle.dumps(shards)).gather(rows), shards.gather(rows))


def test_an_interrupted_build_goes_on_where_it_was(tmp_path) -> None:
    whole = _whole(torch.uint8)
    computed: list[int] = []

    def compute(rows) -> torch.Tensor:
        if rows[0] >= 10 and len(computed) == 2:
            computed.append(-1)
            raise KeyboardInterrupt
        computed.append(rows[0])
        return whole[list(rows)]

    with pytest.raises(KeyboardInterrupt):
        build_shards(tmp_path, ROWS, compute, "building")
    assert not is_complete(tmp_path)
    build_shards(tmp_path, ROWS, compute, "building")
    assert computed == [0, 5, -1, 10, 15, 20]
    assert torch.equal(ShardedTensor(tmp_path).gather(torch.arange(ROWS)), whole)


def test_of_two_runs_that_build_the_same_shards_one_builds_and_one_waits(tmp_path) -> None:
    whole = _whole(torch.uint8)
    computed: list[int] = []

    def compute(rows) -> torch.Tensor:
        computed.append(rows[0])
        time.sleep(0.01)
        return whole[list(rows)]

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(build_shards, tmp_path, ROWS, compute, "building") for _ in range(2)]
        for run in runs:
            run.result()
    assert computed == [0, 5, 10, 15, 20]
    assert torch.equal(ShardedTensor(tmp_path).gather(torch.arange(ROWS)), whole)


def test_a_shard_that_was_cut_before_the_build_was_complete_is_computed_anew(tmp_path) -> None:
    whole = _whole(torch.uint8)
    _built(tmp_path, whole)
    (tmp_path / "shards.json").unlink()
    path = tmp_path / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert torch.equal(_built(tmp_path, whole).gather(torch.arange(ROWS)), whole)


@pytest.mark.parametrize(
    "header",
    [{}, {"rows": 23}, {"rows": "23", "shard_rows": 5}, {"rows": 24, "shard_rows": 5},
     {"rows": 23, "shard_rows": 0}, {"rows": -1, "shard_rows": 5}, {"rows": 23, "shard_rows": 4}],
)  # fmt: skip
def test_a_header_that_does_not_fit_the_shards_is_refused(header, tmp_path) -> None:
    _built(tmp_path, _whole(torch.uint8))
    (tmp_path / "shards.json").write_text(json.dumps(header))
    with pytest.raises(InvDiffError, match=str(tmp_path)):
        ShardedTensor(tmp_path)


@pytest.mark.parametrize("damage", ["short", "long", "empty", "text", "missing"])
def test_a_damaged_shard_is_named_with_what_to_do(damage: str, tmp_path) -> None:
    _built(tmp_path, _whole(torch.uint8))
    path = tmp_path / "00002.safetensors"
    content = path.read_bytes()
    damaged = {
        "short": content[:-1],
        "long": content + b"x",
        "empty": b"",
        "text": b"this is a text, not a shard of numbers",
    }
    path.unlink()
    if damage != "missing":
        path.write_bytes(damaged[damage])
    with pytest.raises(InvDiffError, match=r"00002\.safetensors cannot be read .* delete .*rerun"):
        ShardedTensor(tmp_path)


def test_a_shard_cut_while_it_is_read_is_told(tmp_path) -> None:
    shards = _built(tmp_path, _whole(torch.uint8))
    path = tmp_path / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvDiffError, match="it was truncated"):
        shards.gather(torch.tensor([9]))
