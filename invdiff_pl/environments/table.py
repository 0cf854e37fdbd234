"""The table of losses on disk: written in parts as scoring goes on, whatever the rank."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from invdiff_pl.errors import InvDiffError
from invdiff_pl.files import atomic_path


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
        """Add losses ``[B, 2, T, R]`` of row numbers ``[B]``."""
        self._rows.append(rows.cpu())
        self._losses.append(losses.float().cpu())
        if sum(map(len, self._rows)) >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as one part."""
        if not self._rows:
            return
        rows, losses = torch.cat(self._rows), torch.cat(self._losses)
        path = self.folder / f"part-{int(rows[0]):09d}-{int(rows[-1]):09d}-{len(rows)}.safetensors"
        with atomic_path(path) as partial:
            save_file({"rows": rows, "losses": losses.contiguous()}, partial)
        self._rows, self._losses = [], []

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
            try:
                part = load_file(path)
            except (OSError, SafetensorError) as error:
                raise InvDiffError(f"{path} cannot be read ({error}): delete it, rerun.") from None
            if part["losses"].shape[1:] != self.shape or int(part["rows"].max()) >= count:
                raise InvDiffError(
                    f"{path} is of another scoring run: delete {self.folder} and rerun."
                )
            losses[part["rows"]] = part["losses"]
            present[part["rows"]] = True
        return losses, present
