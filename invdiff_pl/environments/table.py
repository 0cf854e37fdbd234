"""The table of losses on disk: written in parts as scoring goes on, whatever the rank."""

from pathlib import Path

import torch
from torch import Tensor

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_bytes
from invdiff_pl.utils.tensors import read_tensors, require_range, write_tensors


class LossTable:
    """Rows ``[2, T, R]`` of losses, under the own and the empty prompt.

    They are appended in any order, and kept across interruptions.

    Args:
        folder: holds the parts.
        shape: (T, R), timesteps and noises.
        flush_rows: rows collected in memory before a part is written.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], flush_rows: int = 2048) -> None:
        self.folder = folder
        self.shape = (2, *shape)
        self.flush_rows = flush_rows
        self._rows: list[Tensor] = []
        self._losses: list[Tensor] = []

    def append(self, rows: Tensor, losses: Tensor) -> None:
        """Add losses ``[B, 2, T, R]`` of row numbers ``[B]``, on the CPU.

        The losses may still be computed by the device, which is not waited for.

        Raises:
            InvDiffError: as of :meth:`flush`.
        """
        self._rows.append(rows)
        self._losses.append(losses)
        if sum(map(len, self._rows)) >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as one part.

        Raises:
            InvDiffError: if a loss is not finite; rows that are finite are kept.
        """
        if not self._rows:
            return
        rows, losses = torch.cat(self._rows), torch.cat(self._losses).float().cpu()
        self._rows, self._losses = [], []
        finite = losses.isfinite().flatten(1).all(1)
        if finite.any():
            self._write(rows[finite], losses[finite])
        if not finite.all():
            row = int(rows[int((~finite).int().argmax())])
            raise InvDiffError(
                f"stage environments: the denoising loss of image {row} of the train split is not "
                f"finite (nor of {int((~finite).sum()) - 1} others scored since losses were last "
                f"written); all others are kept in {self.folder}; use "
                "trainer.precision=32-true, and run again.",
                "trainer.precision",
            )

    def _write(self, rows: Tensor, losses: Tensor) -> None:
        # Named after all of its rows: parts of other ranks, or of a run on fewer of them, may
        # begin and end at the same ones.
        which = digest_bytes(rows.numpy().tobytes())[:8]
        path = self.folder / f"part-{int(rows[0]):09d}-{which}.safetensors"
        write_tensors(path, {"rows": rows, "losses": losses})

    def read(self, count: int) -> tuple[Tensor, Tensor]:
        """What has been written so far.

        Returns:
            losses float32 ``[count, 2, T, R]`` and a mask bool ``[count]`` of the rows present.

        Raises:
            InvDiffError: if a part is damaged or of another shape.
        """
        losses = torch.zeros((count, *self.shape))
        present = torch.zeros(count, dtype=torch.bool)
        for path in sorted(self.folder.glob("part-*.safetensors")):
            remedy = f"delete {self.folder} and rerun"
            part = read_tensors(path, remedy, rows=1, losses=4)
            if part["losses"].shape != (len(part["rows"]), *self.shape):
                raise InvDiffError(f"{path} is of another scoring run: {remedy}.")
            require_range(path, remedy, "rows", part["rows"], 0, count)
            losses[part["rows"]] = part["losses"].float()
            present[part["rows"]] = True
        return losses, present
