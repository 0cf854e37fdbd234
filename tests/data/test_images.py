"""What becomes of images of every kind, and of broken ones."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from invdiff_pl.data.images import inspect_image, read_image, read_images
from invdiff_pl.utils.errors import InvDiffError


def _colour(path: Path, resolution: int = 4) -> list[int]:
    """The one colour of an image of one colour."""
    pixels = read_image(path, resolution)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, resolution, resolution)
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def _saved(path: Path, mode: str, colour: object, **options: object) -> Path:
    Image.new(mode, (8, 8), colour).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("P", 0, [0, 0, 0]),
        ("I;16", 65535, [255, 255, 255]),
        ("I;16", 30000, [117, 117, 117]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (0, 0, 255, 51), [204, 204, 255]),
        ("LA", (0, 0), [255, 255, 255]),
        ("LA", (0, 51), [204, 204, 204]),
    ],
)
def test_pixels_of_every_mode_become_rgb_with_transparency_over_white(
    mode: str, colour: object, expected: list[int], tmp_path
) -> None:
    path = _saved(tmp_path / "image.png", mode, colour)
    assert _colour(path) == expected
    assert inspect_image(path).mode == mode


def test_a_transparent_palette_colour_is_white(tmp_path) -> None:
    image = Image.new("RGB", (8, 8), (200, 0, 0)).quantize(2)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=image.getpixel((0, 0)))
    assert _colour(tmp_path / "opaque.png") == [200, 0, 0]
    assert _colour(tmp_path / "clear.png") == [255, 255, 255]


def test_cmyk_jpegs_are_converted_not_inverted(tmp_path) -> None:
    path = _saved(tmp_path / "image.jpg", "CMYK", (0, 255, 255, 0), quality=95)
    red, green, blue = _colour(path)
    assert red > 245
    assert max(green, blue) < 10
    assert inspect_image(path).mode == "CMYK"


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 1_000_000)])
def test_pixels_of_unknown_range_are_refused_not_guessed(mode, value, tmp_path) -> None:
    path = _saved(tmp_path / "image.tiff", mode, value)
    with pytest.raises(InvDiffError, match="save it with 8 bits per channel"):
        read_image(path, 4)


# EXIF orientation, and where the red top left quarter of the stored image stands when upright.
@pytest.mark.parametrize(
    ("orientation", "row", "column"), [(1, 0, 0), (2, 0, 1), (3, 1, 1), (6, 0, 1), (8, 1, 0)]
)
def test_exif_rotated_images_stand_upright(orientation, row, column, tmp_path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8, 0] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "image.png", exif=exif)
    quarters = read_image(tmp_path / "image.png", 16)[0, 4::8, 4::8]
    assert (quarters > 128).nonzero().tolist() == [[row, column]]
    assert inspect_image(tmp_path / "image.png").turned == (orientation != 1)


def test_other_shapes_are_scaled_and_cropped_at_the_centre(tmp_path) -> None:
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 15:25] = 200  # what the centre square holds
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert _colour(tmp_path / "wide.png", 10) == [200, 200, 200]
    facts = inspect_image(tmp_path / "wide.png")
    assert (facts.width, facts.height) == (40, 10)


def _broken(folder: Path) -> dict[str, Path]:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = folder / "whole.jpg"
    Image.fromarray(pixels).save(whole)
    paths = {name: folder / f"{name}.jpg" for name in ("missing", "empty", "truncated", "text")}
    paths["empty"].write_bytes(b"")
    paths["truncated"].write_bytes(whole.read_bytes()[:1500])
    paths["text"].write_text("<html>not found</html>")
    paths["folder"] = folder / "folder.jpg"
    paths["folder"].mkdir()
    return paths


@pytest.mark.parametrize(
    ("which", "kind"),
    [
        ("missing", "missing"),
        ("empty", "empty"),
        ("truncated", "unreadable"),
        ("text", "unreadable"),
        ("folder", "unreadable"),
    ],
)
def test_a_broken_image_is_named_with_what_to_do(which: str, kind: str, tmp_path) -> None:
    path = _broken(tmp_path)[which]
    with pytest.raises(InvDiffError, match=f"{which}.* cannot be read .*broken=skip") as caught:
        read_image(path, 32)
    assert "\n" not in str(caught.value)
    assert inspect_image(path).kind == kind


def test_a_picture_too_large_to_be_honest_is_broken_not_decoded(tmp_path, monkeypatch) -> None:
    path = _saved(tmp_path / "image.png", "L", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "decompression bomb" in str(inspect_image(path).problem)


def test_every_byte_flipped_gives_an_image_or_an_error_of_ours(tmp_path) -> None:
    _saved(tmp_path / "whole.png", "RGB", (1, 2, 3))
    content = (tmp_path / "whole.png").read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path = tmp_path / "damaged.png"
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(InvDiffError):
            assert read_image(path, 4).shape == (3, 4, 4)


def test_images_are_read_in_order_whatever_their_names(tmp_path) -> None:
    names = ["Möwe.png", "鳥.png", "with space.png", "🦆.png"]
    paths = [_saved(tmp_path / name, "L", 10 * n) for n, name in enumerate(names)]
    assert read_images(paths, 4)[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
