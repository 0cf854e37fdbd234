"""Features that a user gives in place of the denoiser's, such as embeddings of CLIP or DINO."""

from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.tensors import first_not_finite


def read_features(file: str | Path, count: int | None = None) -> Tensor:
    """Read the user's own features from a file, such as embeddings of CLIP or DINO.

    Args:
        file: ``.npy``, which is read lazily, or ``.safetensors`` with one tensor.
        count: N, if known.

    Returns:
        ``[N, D]`` of the file's float type.

    Raises:
        InvDiffError: if the file cannot be read, or holds something else.
    """
    path = Path(file)
    if path.suffix not in (".npy", ".safetensors") or not path.is_file():
        raise InvDiffError(
            f"features={file}: expected block, losses, or an existing file .npy or .safetensors "
            "of your own features [N, D].",
            "features",
        )
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        else:
            with safe_open(path, framework="pt") as tensors:
                (name,) = tensors.keys()
                found = tensors.get_tensor(name)
    except (OSError, ValueError, TypeError, EOFError, TokenError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InvDiffError(
            f"features={file}: cannot be read as one array of numbers ({reason}).", "features"
        ) from None
    require_features(found, count, f"features={file}", "features")
    return found


def require_features(features: Tensor, count: int | None, told: str, argument: str) -> None:
    """Check that features match the images.

    Args:
        features: the tensor to check.
        count: N, if known.
        told: beginning of the error message.
        argument: name of the argument they were given as.

    Raises:
        InvDiffError: naming the shape or type that was found, or the row that is not finite.
    """
    right = features.ndim == 2 and features.is_floating_point()
    if not right or (count is not None and len(features) != count):
        raise InvDiffError(
            f"{told}: found {str(features.dtype).removeprefix('torch.')} of shape "
            f"{list(features.shape)}; expected floats [{'N' if count is None else count}, D], "
            "one row per image.",
            argument,
        )
    if (bad := first_not_finite(features)) is not None:
        raise InvDiffError(
            f"{told}: the row of image {bad} (counted from 0) holds NaN or infinity; expected "
            "numbers alone.",
            argument,
        )
