"""Tensors computed once a row, kept as safetensors shards and read through memory maps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import atomic_path, read_json, write_json

SHARD_ROWS = 1024
_HEADER = "shards.json"


def build_shards(
    folder: Path, rows: int, compute: Callable[[Sequence[int]], Tensor], description: str
) -> None:
    """Fill ``folder`` with ``compute``'s tensors for rows 0 to ``rows - 1``, a shard at a time.

    A shard that is already there is kept, so an interrupted build goes on where it was.

    Args:
        folder: holds ``00000.safetensors``, … and, once complete, a header.
        rows: number of rows.
        compute: from row numbers to a tensor ``[len(rows), ...]``.
        description: shown beside the progress bar.
    """
    if is_complete(folder):
        return
    starts = range(0, rows, SHARD_ROWS)
    for number, start in enumerate(track(starts, description=description)):
        path = folder / f"{number:05d}.safetensors"
        if not path.exists():
            values = compute(range(start, min(start + SHARD_ROWS, rows)))
            with atomic_path(path) as partial:
                save_file({"values": values.contiguous()}, partial)
    write_json(folder / _HEADER, {"rows": rows, "shard_rows": SHARD_ROWS})


def is_complete(folder: Path) -> bool:
    """Whether every shard of ``folder`` has been written."""
    return (folder / _HEADER).is_file()


class ShardedTensor:
    """Read-only view of a folder of shards as one tensor ``[rows, ...]``, memory-mapped.

    Raises:
        InvDiffError: if the folder is incomplete or a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        header = read_json(folder / _HEADER)
        self.rows: int = header["rows"]
        self._shard_rows: int = header["shard_rows"]
        self._shards: list[Tensor] = []
        for number in range(-(-self.rows // self._shard_rows)):
            path = folder / f"{number:05d}.safetensors"
            try:
                with safe_open(path, framework="pt") as file:
                    self._shards.append(file.get_tensor("values"))
            except (OSError, SafetensorError) as error:
                raise InvDiffError(
                    f"cache shard {path} cannot be read ({error}): delete {folder} and rerun."
                ) from None

    def __len__(self) -> int:
        return self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self._shards[0].shape[1:])

    def gather(self, rows: Tensor, variants: Tensor | None = None) -> Tensor:
        """Rows in the order asked for.

        Args:
            rows: int64 ``[B]``.
            variants: int64 ``[B]``, an index into the second dimension (the flip), if any.

        Returns:
            ``[B, ...]``, a copy in memory.
        """
        first = self._shards[0]
        shape = first.shape[1:] if variants is None else first.shape[2:]
        values = torch.empty((len(rows), *shape), dtype=first.dtype)
        shard_of = rows // self._shard_rows
        for shard in shard_of.unique().tolist():
            chosen = shard_of == shard
            local = rows[chosen] - shard * self._shard_rows
            source = self._shards[shard]
            values[chosen] = source[local] if variants is None else source[local, variants[chosen]]
        return values
