"""Laying pictures out in a grid, and writing them in the background."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from invdiff_pl.utils.files import atomic_path


def image_grid(images: Tensor, columns: int, zoom: int = 1) -> Tensor:
    """Lay images out in rows of ``columns``; an incomplete last row is left out.

    Args:
        images: ``[N, 3, H, W]``.
        columns: number of images per row.
        zoom: whole number by which each pixel is enlarged.

    Returns:
        ``[3, rows * H * zoom, columns * W * zoom]``.
    """
    rows = len(images) // columns
    complete = images[: rows * columns].unflatten(0, (rows, columns))
    grid = complete.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return grid.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2).contiguous()


class ImageWriter:
    """Writes PNG files in background threads, each aside and renamed.

    A failed write (to a full disk, say) surfaces at the next call of any method. If images come
    faster than they can be written, :meth:`write` waits, so that memory stays bounded.

    Args:
        threads: number of threads that compress and write.
        most: largest number of images that may wait to be written.
    """

    def __init__(self, threads: int = 2, most: int = 512) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._most = most
        self._waiting: deque[Future[None]] = deque()

    def write(self, file: Path, image: Tensor) -> None:
        """Hand over an image, uint8 ``[3, H, W]`` on the CPU."""
        self.check()
        while len(self._waiting) >= self._most:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(write_png, file, image))

    def check(self) -> None:
        """Raise the error of an image that could not be written, if there is one."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def close(self) -> None:
        """Wait for the last image, and let the threads go, whatever went wrong."""
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


def write_png(file: Path, image: Tensor) -> None:
    """Write an image, uint8 ``[3, H, W]`` on the CPU, aside, and rename it."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    with atomic_path(file, durable=False) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")
