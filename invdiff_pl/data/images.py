"""Reading image files of any mode and size, turned as their EXIF tag says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.threads import map_in_threads

_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageFacts:
    """What an image file holds.

    Attributes:
        problem: why it cannot be read, ``None`` if it can.
        kind: kind of the problem in one word: ``missing``, ``empty`` or ``unreadable``.
        mode: Pillow's name of its pixels' mode.
        width: width in pixels, upright.
        height: height in pixels, upright.
        turned: whether its EXIF tag turns or mirrors it.
    """

    problem: str | None = None
    kind: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    turned: bool = False


def read_image(path: Path, resolution: int) -> Tensor:
    """Read an image, scaled so that its short side is ``resolution`` and cropped at the centre.

    Transparent pixels are laid over white, 16-bit grey is scaled to 8 bits, and CMYK is converted
    without a colour profile.

    Returns:
        uint8 ``[3, resolution, resolution]``.

    Raises:
        InvDiffError: if the file is missing or is not a readable image.
    """
    image, facts = _decode(path)
    if image is None:
        raise InvDiffError(
            f"image {path} cannot be read ({facts.problem}): replace the file, remove its row, or "
            "leave broken images out with broken=skip.",
            "broken",
        )
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_images(paths: Sequence[Path], resolution: int) -> Tensor:
    """Read several images, uint8 ``[N, 3, resolution, resolution]``, decoded in threads."""
    return torch.stack(list(map_in_threads(lambda path: read_image(path, resolution), paths)))


def inspect_image(path: Path) -> ImageFacts:
    """Report what an image file holds, decoding all of it, as :func:`read_image` does."""
    return _decode(path)[1]


def _decode(path: Path) -> tuple[Image.Image | None, ImageFacts]:
    """Return the image as RGB, upright, or ``None`` and the reason."""
    try:
        if path.stat().st_size == 0:
            return None, ImageFacts("the file is empty", "empty")
        with Image.open(path) as file:
            mode, turned = file.mode, file.getexif().get(_ORIENTATION, 1) != 1
            image = to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError:
        return None, ImageFacts("there is no such file", "missing")
    except UnidentifiedImageError:
        return None, ImageFacts("it is not an image of a known format", "unreadable")
    except Exception as error:  # decoders may raise anything on a damaged file
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(told.split())
        return None, ImageFacts(reason, "unreadable")
    return image, ImageFacts(None, "", mode, *image.size, turned)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparent pixels over white, 16-bit grey as 8 bits.

    Raises:
        ValueError: if the range of its pixels is unknown.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                "32-bit pixels, whose range is unknown: save it with 8 bits per channel"
            )
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels, whose range is unknown: save it with 8 bits per channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
