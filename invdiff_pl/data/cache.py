"""Tensors computed once per row, kept as safetensors shards and read row by row."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from operator import index
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import on_device
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_file, read_object, write_json
from invdiff_pl.utils.locks import build_lock
from invdiff_pl.utils.progress import telling
from invdiff_pl.utils.tensors import write_tensors

SHARD_ROWS = 1024
_PART_ROWS = 128  # computed at a time
_HEADER = "shards.json"
_MOST_ROWS = 1 << 40
_DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}


def build_shards(
    folder: Path, rows: int, compute: Callable[[Sequence[int]], Tensor], description: str
) -> None:
    """Fill ``folder`` with ``compute``'s tensors for rows 0 to ``rows - 1``, shard by shard.

    A shard that exists already is kept, so an interrupted build resumes where it was. Of several
    processes one builds, and the others wait for it. The header holds the digest of each shard.

    Args:
        folder: folder of ``00000.safetensors``, … and, once complete, a header.
        rows: number of rows.
        compute: function from row numbers to a tensor ``[len(rows), ...]``.
        description: text shown beside the progress bar.
    """
    if is_complete(folder):
        return
    with build_lock(folder, description):
        if is_complete(folder):  # by another run, meanwhile
            return
        digests = []
        with telling(description, rows, "row") as reach:
            for number, start in enumerate(range(0, rows, SHARD_ROWS)):
                path = folder / f"{number:05d}.safetensors"
                end = min(start + SHARD_ROWS, rows)
                if not _is_whole(path):
                    values = []
                    for first in range(start, end, _PART_ROWS):
                        values.append(compute(range(first, min(first + _PART_ROWS, end))))
                        reach(min(first + _PART_ROWS, end))
                    write_tensors(path, {"values": torch.cat(values)})
                digests.append(digest_file(path))
                reach(end)
        header = {"rows": rows, "shard_rows": SHARD_ROWS, "digests": digests}
        write_json(folder / _HEADER, header)


def _is_whole(path: Path) -> bool:
    try:
        _Shard.read(path)
    except (OSError, ValueError):
        return False
    return True


def is_complete(folder: Path) -> bool:
    """Whether every shard of ``folder`` has been written."""
    return (folder / _HEADER).is_file()


@dataclass(frozen=True)
class _Shard:
    """Where the values of a safetensors file are.

    Attributes:
        path: path of the file.
        start: offset of the values, in bytes.
        shape: shape of the values.
        dtype: dtype of the values.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def read(cls, path: Path) -> "_Shard":
        """Read a file's header.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not a safetensors file of ``values``, or incomplete.
        """
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is damaged")
            content = stream.read(length)
        try:
            values = json.loads(content)["values"]
            first, last = map(index, values["data_offsets"])
            shape = tuple(map(index, values["shape"]))
            dtype = _DTYPES[values["dtype"]]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise ValueError("its header is damaged") from None
        if first != 0 or min(shape, default=0) < 1 or last != prod(shape) * dtype.itemsize:
            raise ValueError("its header is damaged")
        if path.stat().st_size != 8 + length + last:
            raise ValueError("it is incomplete")
        return cls(path, 8 + length + first, shape, dtype)


class RowSource(Protocol):
    """Rows of one tensor ``[rows, ...]``, wherever they are held."""

    rows: int

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Number of bytes of all values."""

    def held_on(self, device: torch.device) -> bool:
        """Whether all rows are held in a device's memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""

    @property
    def device(self) -> torch.device:
        """Device of gathered rows."""

    def gather(self, rows: Tensor, variants: Tensor | None = None) -> Tensor:
        """Return rows in the given order."""


class ResidentTensor:
    """Rows held in memory or on a device.

    Args:
        values: the rows, ``[rows, ...]``.
    """

    def __init__(self, values: Tensor) -> None:
        self.rows = len(values)
        self.values = values

    @classmethod
    def read(cls, shards: "ShardedTensor", device: torch.device) -> "ResidentTensor":
        """Read all rows of shards once, and hold them on a device."""
        values = torch.empty((len(shards), *shards.shape), dtype=shards.dtype, device=device)
        for part in torch.arange(len(shards)).split(SHARD_ROWS):
            values[part[0] : part[-1] + 1] = shards.gather(part).to(device)
        return cls(values)

    def __len__(self) -> int:
        return self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.values.shape[1:])

    @property
    def nbytes(self) -> int:
        """Number of bytes of all values."""
        return self.values.nbytes

    def held_on(self, device: torch.device) -> bool:
        """Whether all rows are held in a device's memory."""
        return self.device == device

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.values.device

    def gather(self, rows: Tensor, variants: Tensor | None = None) -> Tensor:
        """Return rows in the given order, as :meth:`ShardedTensor.gather` does."""
        rows = on_device(rows, self.device)
        return (
            self.values[rows]
            if variants is None
            else self.values[rows, on_device(variants, self.device)]
        )


class ShardedTensor:
    """Read-only view of a folder of shards as one tensor ``[rows, ...]``.

    Rows are read from the files on demand. A memory map would read ahead megabytes around each row,
    many times what random batches of a large data set need.

    Raises:
        InvDiffError: if the folder is incomplete or a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        header = read_object(folder / _HEADER, rows=int, shard_rows=int)
        self.rows: int = header["rows"]
        self._shard_rows: int = header["shard_rows"]
        if not (1 <= self.rows < _MOST_ROWS and 1 <= self._shard_rows < _MOST_ROWS):
            raise _damaged(folder / _HEADER, "its numbers are out of range")
        self._shards: list[_Shard] = []
        for number in range(-(-self.rows // self._shard_rows)):
            path = folder / f"{number:05d}.safetensors"
            try:
                self._shards.append(_Shard.read(path))
            except (OSError, ValueError) as error:
                raise _damaged(path, error) from None
            self._require_fit(number)

    def _require_fit(self, number: int) -> None:
        """Reject a shard that does not hold the rows that the header says."""
        shard, first = self._shards[number], self._shards[0]
        rows = min(self._shard_rows, self.rows - number * self._shard_rows)
        if (shard.shape[0], shard.shape[1:], shard.dtype) != (rows, first.shape[1:], first.dtype):
            raise _damaged(shard.path, "its rows are not those of the other shards")

    def __len__(self) -> int:
        return self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self._shards[0].shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self._shards[0].dtype

    @property
    def nbytes(self) -> int:
        """Number of bytes of all values."""
        return self.rows * prod(self.shape) * self.dtype.itemsize

    def held_on(self, device: torch.device) -> bool:
        """Whether all rows are held in a device's memory: never."""
        return False

    @property
    def device(self) -> torch.device:
        """Device of gathered rows: the host's memory."""
        return torch.device("cpu")

    def gather(self, rows: Tensor, variants: Tensor | None = None) -> Tensor:
        """Return rows in the given order.

        Args:
            rows: int64 ``[B]``.
            variants: int64 ``[B]``, an index into the second dimension (the flip), if any.

        Returns:
            ``[B, ...]``, a copy in memory.
        """
        shape = self.shape if variants is None else self.shape[1:]
        values = torch.empty((len(rows), *shape), dtype=self.dtype)
        memory = values.flatten().view(torch.uint8).numpy()
        size = prod(shape) * values.element_size()
        units = rows % self._shard_rows
        if variants is not None:
            units = units * self.shape[0] + variants
        shard_of = rows // self._shard_rows
        for number in shard_of.unique().tolist():
            shard = self._shards[number]
            places = (shard_of == number).nonzero().squeeze(1)
            with shard.path.open("rb", buffering=0) as stream:
                for place, unit in zip(places.tolist(), units[places].tolist(), strict=True):
                    stream.seek(shard.start + unit * size)
                    if stream.readinto(memory[place * size : (place + 1) * size]) != size:
                        raise _damaged(shard.path, "it was truncated")
        return values


def _damaged(path: Path, why: object) -> InvDiffError:
    return InvDiffError(
        f"cache shard {path} cannot be read ({why}): delete {path.parent} and rerun."
    )
