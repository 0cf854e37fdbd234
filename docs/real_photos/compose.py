"""Pictures composed of photographs: cut-outs pasted on strips of scenes, split by split."""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from packages import Source, UserError, fetch
from photographs import Scene
from PIL import Image, ImageEnhance, ImageOps

T = TypeVar("T")

SPLITS = ("train", "val", "test")
SHARES = (0.5, 0.25, 0.25)  # each split's share of a photograph's width


class Row(NamedTuple):
    """One image to compose: a stamp on the split's strip of a photograph."""

    stamp: Source
    scene: Source
    split: int


Strips = dict[str, dict[int, tuple[float, float]]]
"""Left and right edge, in shares of the region's width, by photograph and split."""


def cut_strips(scenes: list[Source], rng: np.random.Generator) -> Strips:
    """Cut each photograph into upright strips, one per split, in random order.

    No split sees a pixel of another's, yet all see the same places: there are so few photographs
    that splits of whole ones would differ in what land and water look like.
    """
    strips: Strips = {}
    for scene in scenes:
        order = [int(split) for split in rng.permutation(len(SPLITS))]
        edges = np.cumsum([0.0, *(SHARES[split] for split in order)])
        strips[scene.key] = {
            split: (float(left), float(right))
            for split, left, right in zip(order, edges[:-1], edges[1:], strict=True)
        }
    return strips


def plan_split(
    stamps: list[Source],
    scenes: list[Source],
    homes: Sequence[int],
    split: int,
    size: int,
    correlation: float,
    rng: np.random.Generator,
) -> list[Row]:
    """Choose stamp and scene for each image of a split, in random order.

    All kinds of stamps are equally frequent, and a share ``correlation`` of each kind is put on
    scenes of its own class, ``homes[kind]``. All stamps of a kind are equally frequent, and so are
    all photographs of a class.
    """
    rows = []
    for kind, home in enumerate(homes):
        count = -(-size * (kind + 1) // len(homes)) + (-size * kind // len(homes))
        own = round(correlation * count)
        chosen = deal([stamp for stamp in stamps if stamp.label == kind], count, rng)
        at_home = deal([scene for scene in scenes if scene.label == home], own, rng)
        away = deal([scene for scene in scenes if scene.label != home], count - own, rng)
        rows += [Row(*pair, split) for pair in zip(chosen, at_home + away, strict=True)]
    return [rows[i] for i in rng.permutation(len(rows))]


def deal(items: list[T], count: int, rng: np.random.Generator) -> list[T]:
    """Return ``count`` items in random order, all equally often or nearly so."""
    return [items[i] for i in rng.permutation(np.resize(np.arange(len(items)), count))]


def load_stamp(path: Path) -> Image.Image:
    """Load a stamp as RGBA, cropped to what is not transparent."""
    stamp = _open(path).convert("RGBA")
    return stamp.crop(stamp.getchannel("A").getbbox())


def load_scene(path: Path, region: tuple[int, int, int, int], size: int) -> Image.Image:
    """Load a region of a photograph as RGB, not much larger than crops of ``size`` px need."""
    photo = _open(path).convert("RGB")
    left, right = (round(edge * photo.width / 100) for edge in region[::2])
    top, bottom = (round(edge * photo.height / 100) for edge in region[1::2])
    photo = photo.crop((left, top, right, bottom))
    shrink = min(1.0, 2 * size / largest_crop(photo))
    return _resize(photo, [shrink * side for side in photo.size])


def largest_crop(scene: Image.Image) -> float:
    """Return the side of the largest square that fits every split's strip, in pixels."""
    return min(scene.height, min(SHARES) * scene.width)


def _resize(image: Image.Image, extents: Sequence[float]) -> Image.Image:
    width, height = (max(1, round(extent)) for extent in extents)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image: {error}.") from None


def compose(
    stamp: Image.Image,
    scene: Image.Image,
    strip: tuple[float, float],
    size: int,
    rng: np.random.Generator,
) -> Image.Image:
    """Paste a stamp near the centre of a random crop of a scene's strip; RGB, ``size`` px square.

    Crops are equally large in all splits, so that the splits differ in nothing but the place.
    """
    side = largest_crop(scene) * rng.uniform(0.6, 1.0)
    left = rng.uniform(strip[0] * scene.width, strip[1] * scene.width - side)
    top = rng.uniform(0, scene.height - side)
    box = (left, top, left + side, top + side)
    image = scene.resize((size, size), Image.Resampling.LANCZOS, box=box)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.5:
        stamp = ImageOps.mirror(stamp)
    # Tall stamps are limited to 85 % of the height.
    scale = min(rng.uniform(0.35, 0.65) * size / stamp.width, 0.85 * size / stamp.height)
    stamp = _resize(stamp, [scale * extent for extent in stamp.size])
    centre = size * rng.uniform(0.35, 0.65, 2)
    x, y = np.clip(np.rint(centre - np.divide(stamp.size, 2)), 0, size - np.array(stamp.size))
    image.paste(stamp, (int(x), int(y)), stamp)
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15))


def pictures(
    rows: list[Row], strips: Strips, table: dict[str, Scene], size: int, seed: int
) -> Iterator[Image.Image]:
    """Yield the composed images of ``rows``, one by one."""
    stamps = {stamp: load_stamp(stamp.path) for stamp in {row.stamp for row in rows}}
    scenes = {
        scene: load_scene(scene.path, table[scene.key].region, size)
        for scene in {row.scene for row in rows}
    }
    for i, (stamp, scene, split) in enumerate(rows):
        # Each image has its own generator, so that it does not depend on those before it.
        rng = np.random.default_rng([seed, 1, i])
        yield compose(stamps[stamp], scenes[scene], strips[scene.key][split], size, rng)


def plan(
    args: argparse.Namespace, stamps: list[Source], scenes: list[Source], homes: Sequence[int]
) -> tuple[list[Row], Strips]:
    """Plan the rows of all splits, and the strips of scenes that they use."""
    rng = np.random.default_rng([args.seed, 0])
    strips = cut_strips(scenes, rng)
    rows: list[Row] = []
    for split, name in enumerate(SPLITS):
        correlation = args.correlation if name == "train" else 0.5
        size = getattr(args, name)
        rows += plan_split(stamps, scenes, homes, split, size, correlation, rng)
    return rows, strips


def write_sources(
    folder: Path, stamps: list[Source], scenes: list[Source], strips: Strips, named: str
) -> None:
    """Write ``sources.json``: the stamps, and each split's strip of each photograph."""
    sources = {
        named: sorted(stamp.key for stamp in stamps),
        "scenes": {
            scene.key: {name: strips[scene.key][split] for split, name in enumerate(SPLITS)}
            for scene in scenes
        },
    }
    text = json.dumps(sources, indent=2) + "\n"
    (folder / "sources.json").write_text(text, encoding="utf-8")


@contextmanager
def renamed(target: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to ``target`` once it is complete."""
    if target.exists():
        raise UserError(f"--output {target} exists already: remove it or name another.")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def unpacked(fetched: bool, folders: Sequence[Path], packages: set[str]) -> Iterator[list[Path]]:
    """Yield the folders to search: those of packages fetched for now, or the given ones."""
    if not fetched:
        yield list(folders)
        return
    with tempfile.TemporaryDirectory() as folder:
        fetch(sorted(packages), Path(folder))
        yield [Path(folder)]


def counts(sources: list[Source], names: Sequence[str]) -> str:
    """Format how many there are of each class, such as ``21 land / 12 water``."""
    labels = [source.label for source in sources]
    return " / ".join(f"{labels.count(label)} {name}" for label, name in enumerate(names))


def add_options(parser: argparse.ArgumentParser, train: int, val: int, test: int) -> None:
    """Add the options that all scripts have, with default numbers of images."""
    parser.add_argument(
        "--fetch", action="store_true", help="download the Debian packages to a temporary folder"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (default 64)")
    for name, count in zip(SPLITS, (train, val, test), strict=True):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"images (default {count})")
    parser.add_argument(
        "--correlation",
        type=float,
        default=0.95,
        help="share of each kind's training images that are as usual (default 0.95; 0.5 in val "
        "and test)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")


def read_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, folders: str
) -> argparse.Namespace:
    """Read the options of a script that takes unpacked packages by ``--folders``."""
    parser.add_argument("--folders", type=Path, nargs="+", help=folders)
    add_options(parser, train=2000, val=400, test=800)
    args = parser.parse_args(arguments)
    if args.fetch == bool(args.folders):
        parser.error("give either --fetch or --folders")
    check_options(parser, args)
    return args


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse numbers that are out of range."""
    for flag, least in (("size", 16), ("train", 1), ("val", 0), ("test", 0), ("seed", 0)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag} must be at least {least}, not {getattr(args, flag)}")
    if not 0 <= args.correlation <= 1:
        parser.error(f"--correlation must lie between 0 and 1, not {args.correlation}")
