"""Images written in the background: all of them, bounded, and failures seen."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from invdiff_pl.utils import images
from invdiff_pl.utils.images import ImageWriter, write_png


def _picture(value: int) -> torch.Tensor:
    return torch.full((3, 4, 5), value, dtype=torch.uint8)


def test_all_images_are_written_as_they_were_given(tmp_path: Path) -> None:
    writer = ImageWriter(most=2)
    for number in range(9):
        writer.write(tmp_path / f"{number}.png", _picture(number))
    writer.close()
    for number in range(9):
        with Image.open(tmp_path / f"{number}.png") as image:
            assert (image.size, image.getpixel((4, 3))) == ((5, 4), (number,) * 3)
    assert len(list(tmp_path.iterdir())) == 9


def test_a_failed_write_surfaces_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = ImageWriter()
    writer.write(tmp_path / "file" / "0.png", _picture(0))  # a folder that cannot be made
    with pytest.raises(OSError, match="file"):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_who_draws_faster_than_the_disk_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, begun = threading.Semaphore(0), []

    def slow(file: Path, image: torch.Tensor) -> None:
        begun.append(file)
        disk.acquire(timeout=30)
        write_png(file, image)

    monkeypatch.setattr(images, "write_png", slow)
    writer = ImageWriter(threads=1, most=3)
    handed: list[int] = []

    def draw() -> None:
        for number in range(5):
            writer.write(tmp_path / f"{number}.png", _picture(number))
            handed.append(number)

    drawing = threading.Thread(target=draw)
    drawing.start()
    drawing.join(0.5)
    assert handed == [0, 1, 2]
    for _ in range(5):
        disk.release()
    drawing.join(30)
    writer.close()
    assert len(list(tmp_path.glob("*.png"))) == 5
