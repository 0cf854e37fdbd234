"""Features on disk: written in parts as images pass, on any rank, and read as one array."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path, digest_bytes
from invdiff_pl.utils.tensors import read_tensors, require_range, write_tensors


class FeatureTable:
    """A table of features on disk, with the prompt of each row.

    Rows are appended in any order, and kept across interruptions. Features and losses are stored
    in float16, and held in memory only while a part is collected.

    Args:
        folder: folder of the parts.
        flush_rows: number of rows collected in memory before a part is written.
    """

    def __init__(self, folder: Path, flush_rows: int = 2048) -> None:
        self.folder = folder
        self.flush_rows = flush_rows
        self._rows: list[Tensor] = []
        self._prompts: list[Tensor] = []
        self._features: list[Tensor] = []

    def append(self, rows: Tensor, prompts: Tensor, features: Tensor) -> None:
        """Add features ``[B, D]`` with their row numbers and prompts ``[B]``.

        A device may still be computing them; it is not waited for.

        Raises:
            InvDiffError: as for :meth:`flush`.
        """
        self._rows.append(rows)
        self._prompts.append(prompts)
        self._features.append(features)
        if sum(map(len, self._rows)) >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Write the rows collected so far as one part.

        Raises:
            InvDiffError: if a feature is not finite; rows that are finite are kept.
        """
        if not self._rows:
            return
        rows, prompts = torch.cat(self._rows).cpu(), torch.cat(self._prompts).cpu()
        features = torch.cat(self._features).half().cpu()
        self._rows, self._prompts, self._features = [], [], []
        finite = features.isfinite().all(1)
        if finite.any():
            self._write(rows[finite], prompts[finite], features[finite])
        if not finite.all():
            row = int(rows[int((~finite).int().argmax())])
            raise InvDiffError(
                f"stage environments: features of image {row} of the train split are not finite in "
                f"float16 (nor are {int((~finite).sum()) - 1} others since the last were written); "
                f"all others are kept in {self.folder}; use trainer.precision=32-true, or a "
                "model.block whose outputs are smaller, and run again.",
                "trainer.precision",
            )

    def _write(self, rows: Tensor, prompts: Tensor, features: Tensor) -> None:
        # Named after all of its rows: parts of other ranks, or of a run on fewer ranks, may begin
        # and end at the same rows.
        which = digest_bytes(rows.numpy().tobytes())[:8]
        path = self.folder / f"part-{int(rows[0]):09d}-{which}.safetensors"
        write_tensors(path, {"rows": rows, "prompts": prompts, "features": features})

    def rows(self) -> Tensor:
        """Return the numbers of the rows written so far, int64, ascending.

        Raises:
            InvDiffError: if a part is damaged.
        """
        found = [part["rows"] for part in map(self._part, self._parts())]
        return torch.cat(found).unique() if found else torch.zeros(0, dtype=torch.int64)

    def prompts(self) -> Tensor:
        """Return the prompt of every row, int64 ``[N]``.

        Raises:
            InvDiffError: if rows are missing, or a part is damaged.
        """
        rows = self.rows()
        count = int(rows.max()) + 1 if len(rows) else 0
        if len(rows) < max(count, 1):
            raise InvDiffError(
                f"{self.folder} lacks the features of {max(count, 1) - len(rows)} of {count} "
                "images: run the same command again, which computes them."
            )
        prompts = torch.zeros(count, dtype=torch.int64)
        for part in map(self._part, self._parts()):
            prompts[part["rows"]] = part["prompts"]
        return prompts

    def read(self, file: Path) -> Tensor:
        """Join the parts in a file, which is then read lazily.

        Args:
            file: ``.npy`` file, overwritten if it exists.

        Returns:
            features float16 ``[N, D]``, mapped from the file.

        Raises:
            InvDiffError: if rows are missing, or a part is damaged or of another run.
        """
        parts, count = self._parts(), len(self.prompts())
        width = self._part(parts[0])["features"].shape[1]
        with atomic_path(file) as partial:
            array = np.lib.format.open_memmap(partial, "w+", np.float16, (count, width))
            for path in parts:
                part = self._part(path)
                if part["features"].shape[1] != width:
                    raise InvDiffError(f"{path} is of another run: {self._remedy}.")
                array[part["rows"].numpy()] = part["features"].numpy()
            array.flush()
        return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))

    @property
    def _remedy(self) -> str:
        return f"delete {self.folder} and rerun"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.safetensors"))

    def _part(self, path: Path) -> dict[str, Tensor]:
        part = read_tensors(path, self._remedy, rows=1, prompts=1, features=2)
        require_range(path, self._remedy, "rows", part["rows"], 0)
        require_range(path, self._remedy, "prompts", part["prompts"], 0)
        if not len(part["rows"]) == len(part["prompts"]) == len(part["features"]):
            raise InvDiffError(
                f"{path}: rows, prompts and features differ in number: {self._remedy}."
            )
        return part
