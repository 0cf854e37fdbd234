"""Reading image files as they come: any mode, any size, turned as their EXIF tag says."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from invdiff_pl.errors import InvDiffError


def read_image(path: Path, resolution: int) -> Tensor:
    """One image, scaled so that its short side is ``resolution`` and cropped at the centre.

    Returns:
        uint8 ``[3, resolution, resolution]``.

    Raises:
        InvDiffError: if the file is missing or is no readable image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InvDiffError(
            f"image {path} cannot be read ({error}): replace the file or remove its row."
        ) from None
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_images(paths: Sequence[Path], resolution: int) -> Tensor:
    """Several images, uint8 ``[N, 3, resolution, resolution]``, decoded in threads."""
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(lambda path: read_image(path, resolution), paths)))


def to_float(images: Tensor) -> Tensor:
    """From uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
