"""Lightning checkpoints, written aside and renamed, checked, and loaded without running code."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path


class SafeCheckpointIO(TorchCheckpointIO):
    """Reads and writes checkpoint files on local disks.

    Lightning's own class writes to the system's temporary folder first, and copies from there if
    that is another file system: killed while copying, it leaves half a checkpoint under the final
    name. This class writes beside the target. Reading compares the checksum of every part of the
    file, and accepts tensors and plain values only, whatever a caller asks for.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, atomically."""
        try:
            with atomic_path(Path(path)) as partial, partial.open("wb") as stream:
                torch.save(checkpoint, stream)
        except RuntimeError as error:  # torch's way of reporting a full disk
            if isinstance(cause := error.__context__, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from None
            raise OSError(f"checkpoint {path} cannot be written: {error}") from None

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            InvDiffError: if it is missing or damaged, or holds more than tensors and plain values.
        """
        remedy = "remove it to start the stage anew, or restore it"
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise InvDiffError(f"checkpoint {path} is damaged (at {damaged}): {remedy}.")
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except InvDiffError:
            raise
        except FileNotFoundError:
            raise InvDiffError(f"checkpoint {path} is missing: {remedy}.") from None
        except UnpicklingError:
            raise InvDiffError(
                f"checkpoint {path} holds more than tensors and plain values, which is never "
                f"loaded, as it could run code: {remedy}."
            ) from None
        except Exception as error:  # readers may raise anything on a damaged archive
            reason = " ".join(str(error).split())
            raise InvDiffError(f"checkpoint {path} cannot be read ({reason}): {remedy}.") from None
        if not isinstance(checkpoint, dict):
            raise InvDiffError(f"checkpoint {path} is not a Lightning checkpoint: {remedy}.")
        return checkpoint
