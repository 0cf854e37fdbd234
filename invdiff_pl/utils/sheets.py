"""Contact sheets: rows of small pictures, labelled on the left, under a heading."""

from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from invdiff_pl.utils.labels import font

TILE = 64
_SIDE = 190
_FONT = 15  # pixels; still legible when TensorBoard shows the sheet at half its size
_HEAD = 28


def contact_sheet(
    heading: str, rows: Mapping[str, Iterable[Tensor]], columns: int = 10
) -> Image.Image:
    """Draw a contact sheet.

    Args:
        heading: heading above the rows.
        rows: pictures by the row's name, uint8 ``[3, H, W]``; the first ``columns`` are shown.
        columns: number of pictures per row.

    Returns:
        an RGB picture.

    Example:
        >>> import torch
        >>> contact_sheet("birds", {"on water": torch.zeros(2, 3, 8, 8).byte()}, columns=2).size
        (318, 92)
    """
    sheet = Image.new("RGB", (_SIDE + columns * TILE, _HEAD + len(rows) * TILE), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), heading, fill="black", font=font(_FONT))
    for number, (name, pictures) in enumerate(rows.items()):
        top = _HEAD + number * TILE
        draw.text((4, top + TILE // 2 - _FONT // 2), name, fill="black", font=font(_FONT))
        for place, picture in zip(range(columns), pictures, strict=False):
            sheet.paste(_tile(picture), (_SIDE + place * TILE, top))
    return sheet


def _tile(picture: Tensor) -> Image.Image:
    tile = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
    smooth = Image.Resampling.NEAREST if tile.width < TILE else Image.Resampling.LANCZOS
    return tile.resize((TILE, TILE), smooth)
