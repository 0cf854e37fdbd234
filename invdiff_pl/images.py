"""Pictures side by side."""

from torch import Tensor


def image_grid(images: Tensor, columns: int, zoom: int = 1) -> Tensor:
    """Images side by side, ``columns`` in a row; an incomplete last row is left out.

    Args:
        images: ``[N, 3, H, W]``.
        columns: images in a row.
        zoom: whole number by which each pixel is enlarged.

    Returns:
        ``[3, rows * H * zoom, columns * W * zoom]``.
    """
    rows = len(images) // columns
    complete = images[: rows * columns].unflatten(0, (rows, columns))
    grid = complete.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return grid.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2).contiguous()
