"""Features that a user gives in place of the denoiser's, such as embeddings of CLIP or DINO."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file


def read_features(
    file: str | Path,
    count: int | None = None,
    *,
    argument: str = "features",
    instead: Sequence[str] = (),
) -> Tensor:
    """Read the user's own features from a file, such as embeddings of CLIP or DINO.

    Args:
        file: ``.npy``, which is mapped rather than loaded, or ``.safetensors`` with one tensor.
        count: N, if known.
        argument: name of the argument that the file was given as.
        instead: what that argument takes besides files.

    Returns:
        ``[N, D]`` of the file's float type.

    Raises:
        InvDiffError: if the file cannot be read, or holds something else.
    """
    path = Path(file)
    if path.suffix not in (".npy", ".safetensors") or not is_file(path):
        others = "".join(f"{each}, " for each in instead) + "or " * bool(instead)
        raise InvDiffError(
            f"{argument}={file}: expected {others}an existing file .npy or .safetensors of your "
            "own features [N, D].",
            argument,
        )
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        else:
            with safe_open(path, framework="pt") as tensors:
                (name,) = tensors.keys()
                found = tensors.get_tensor(name)
    except Exception as error:  # numpy and safetensors raise anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvDiffError(
            f"{argument}={file}: cannot be read as one array of numbers ({reason}).", argument
        ) from None
    require_features(found, count, f"{argument}={file}", argument)
    return found


def require_features(features: Tensor, count: int | None, told: str, argument: str) -> None:
    """Check that features match the images.

    Args:
        features: the tensor to check.
        count: N, if known.
        told: beginning of the error message.
        argument: name of the argument they were given as.

    Raises:
        InvDiffError: naming the shape or type that was found.
    """
    right = features.ndim == 2 and features.is_floating_point()
    if not right or (count is not None and len(features) != count):
        raise InvDiffError(
            f"{told}: found {str(features.dtype).removeprefix('torch.')} of shape "
            f"{list(features.shape)}; expected floats [{'N' if count is None else count}, D], "
            "one row per image.",
            argument,
        )
