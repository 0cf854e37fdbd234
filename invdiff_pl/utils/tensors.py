"""Safetensors files, written whole or not at all, and checks of tensors that were read."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path

# Number of rows that are checked at a time.
_PART = 16384


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, atomically.

    Raises:
        OSError: if they cannot be written.
    """
    with atomic_path(path) as partial:
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        except SafetensorError as error:
            raise system_error(error, path) from None


def system_error(error: SafetensorError, path: Path | None = None) -> OSError:
    """Return the system's error behind a failed write, such as a lack of space."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return OSError(f"{path or 'tensors'} cannot be written: {error}")
    number = int(found[1])
    return OSError(number, os.strerror(number), *([str(path)] if path else []))


def read_tensors(path: Path, remedy: str, **dimensions: int) -> dict[str, Tensor]:
    """Read every tensor of a file.

    The format states the length of the file, so one that was cut or appended to is noticed.

    Args:
        path: path of the file.
        remedy: what to do about a missing or damaged file, for the message.
        dimensions: number of dimensions of each required tensor.

    Raises:
        InvDiffError: if the file is missing or damaged, or a tensor is missing or of another form.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InvDiffError(f"{path} is missing: {remedy}.") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InvDiffError(f"{path} cannot be read ({reason}): {remedy}.") from None
    for name, count in dimensions.items():
        if name not in tensors or tensors[name].ndim != count:
            found = f"shape {list(tensors[name].shape)}" if name in tensors else "nothing"
            raise InvDiffError(
                f"{path}: expected a tensor {name!r} of {count} dimensions, found {found}: "
                f"{remedy}."
            )
    return tensors


def require_range(
    path: Path, remedy: str, name: str, values: Tensor, low: int, high: int | None = None
) -> None:
    """Refuse indices that are not integers or are out of range.

    Args:
        path: file that they come from.
        remedy: what to do, for the message.
        name: name of the tensor.
        values: tensor of any shape.
        low: smallest value allowed.
        high: bound that values must be below; no limit if not given.

    Raises:
        InvDiffError: naming the file and the tensor.
    """
    whole = values.dtype == torch.int64
    inside = whole and (
        values.numel() == 0
        or (int(values.min()) >= low and (high is None or int(values.max()) < high))
    )
    if not inside:
        limit = f"from {low} on" if high is None else f"from {low} to {high - 1}"
        raise InvDiffError(f"{path}: expected whole numbers {limit} in {name!r}: {remedy}.")


def first_not_finite(values: Tensor) -> int | None:
    """Return the number of the first row with NaN or infinity, ``None`` if there is none.

    Rows are read in parts: they may be mapped from a file larger than memory.

    Example:
        >>> first_not_finite(torch.tensor([[1.0, 2.0], [1.0, torch.nan]]))
        1
    """
    finite = torch.cat([part.isfinite().all(dim=1) for part in values.split(_PART)])
    return None if finite.all() else int((~finite).nonzero()[0])
