"""Build a folder in the Waterbirds layout from real photographs: bird cut-outs pasted on scenes.

Waterbirds (Sagawa et al., "Distributionally Robust Neural Networks", ICLR 2020) pastes birds of
CUB on scenes of Places. This script does the same with photographs that Debian packages ship:
the bird stamps of Tux Paint and the photographic wallpapers of several desktops.

    python build_waterbirds.py --fetch --output waterbirds_photos
"""

import argparse
import csv
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from photographs import (
    BIRD_PACKAGE,
    LABELS,
    Source,
    UserError,
    bird_table,
    fetch,
    find_sources,
    scene_table,
)
from PIL import Image, ImageEnhance, ImageOps

T = TypeVar("T")

SPLITS = ("train", "val", "test")
SHARES = (0.5, 0.25, 0.25)  # of a photograph's width that each split sees
COLUMNS = ("img_id", "img_filename", "y", "split", "place", "place_filename")


class Row(NamedTuple):
    """One image to compose: a stamp on the split's strip of a photograph."""

    bird: Source
    scene: Source
    split: int


Strips = dict[str, dict[int, tuple[float, float]]]
"""Left and right edge, in shares of the region's width, by photograph and split."""


def cut_strips(scenes: list[Source], rng: np.random.Generator) -> Strips:
    """Cut each photograph upright into one strip a split, in random order.

    No split sees a pixel of another's, yet all see the same places: with the few photographs there
    are, splits of whole photographs would differ in what land and water look like.
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
    birds: list[Source],
    scenes: list[Source],
    split: int,
    size: int,
    correlation: float,
    rng: np.random.Generator,
) -> list[Row]:
    """Choose bird and scene of each image of a split, in random order.

    Half of the birds are of water, and a share ``correlation`` of each kind stands on its own
    place. Within a kind all stamps, and within a place all photographs, are equally frequent.
    """
    rows = []
    for label, count in enumerate((size - size // 2, size // 2)):
        own = round(correlation * count)
        chosen = _deal([bird for bird in birds if bird.label == label], count, rng)
        at_home = _deal([scene for scene in scenes if scene.label == label], own, rng)
        away = _deal([scene for scene in scenes if scene.label != label], count - own, rng)
        rows += [Row(*pair, split) for pair in zip(chosen, at_home + away, strict=True)]
    return [rows[i] for i in rng.permutation(len(rows))]


def _deal(items: list[T], count: int, rng: np.random.Generator) -> list[T]:
    return [items[i] for i in rng.permutation(np.resize(np.arange(len(items)), count))]


def load_bird(path: Path) -> Image.Image:
    """The stamp as RGBA, cropped to what is not transparent."""
    stamp = _open(path).convert("RGBA")
    return stamp.crop(stamp.getchannel("A").getbbox())


def load_scene(path: Path, region: tuple[int, int, int, int], size: int) -> Image.Image:
    """The region of a photograph as RGB, not much larger than crops of ``size`` px need."""
    photo = _open(path).convert("RGB")
    left, right = (round(edge * photo.width / 100) for edge in region[::2])
    top, bottom = (round(edge * photo.height / 100) for edge in region[1::2])
    photo = photo.crop((left, top, right, bottom))
    shrink = min(1.0, 2 * size / largest_crop(photo))
    return _resize(photo, [shrink * side for side in photo.size])


def largest_crop(scene: Image.Image) -> float:
    """Side of the largest square that fits every split's strip, in pixels."""
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
    bird: Image.Image,
    scene: Image.Image,
    strip: tuple[float, float],
    size: int,
    rng: np.random.Generator,
) -> Image.Image:
    """Paste a bird near the centre of a random crop of a scene's strip; RGB, ``size`` px square.

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
        bird = ImageOps.mirror(bird)
    # Tall birds are held to 85 % of the height.
    scale = min(rng.uniform(0.35, 0.65) * size / bird.width, 0.85 * size / bird.height)
    bird = _resize(bird, [scale * extent for extent in bird.size])
    centre = size * rng.uniform(0.35, 0.65, 2)
    x, y = np.clip(np.rint(centre - np.divide(bird.size, 2)), 0, size - np.array(bird.size))
    image.paste(bird, (int(x), int(y)), bird)
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15))


def write_dataset(rows: list[Row], strips: Strips, output: Path, size: int, seed: int) -> None:
    """Compose and save the images of ``rows`` and ``metadata.csv`` in the published layout."""
    species = {stamp: name for stamp, (_, name) in bird_table().items()}
    number = {name: i + 1 for i, name in enumerate(sorted(set(species.values())))}
    table = scene_table()
    birds = {bird: load_bird(bird.path) for bird in {row.bird for row in rows}}
    scenes = {
        scene: load_scene(scene.path, table[scene.key].region, size)
        for scene in {row.scene for row in rows}
    }
    drawn: Counter[str] = Counter()
    with (output / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i, (bird, scene, split) in enumerate(rows):
            kind = species[bird.key]
            drawn[kind] += 1
            name = f"{number[kind]:03d}.{kind}/{kind}_{drawn[kind]:04d}.png"
            (output / name).parent.mkdir(exist_ok=True)
            # A generator of its own for each image: it does not depend on those before it.
            rng = np.random.default_rng([seed, 1, i])
            strip = strips[scene.key][split]
            compose(birds[bird], scenes[scene], strip, size, rng).save(output / name)
            writer.writerow((i + 1, name, bird.label, split, scene.label, f"/{scene.key}"))


def build(args: argparse.Namespace, birds: list[Source], scenes: list[Source]) -> None:
    """Cut, plan, compose; write to a temporary name, rename, and report the counts."""
    rng = np.random.default_rng([args.seed, 0])
    strips = cut_strips(scenes, rng)
    rows: list[Row] = []
    for split, name in enumerate(SPLITS):
        correlation = args.correlation if name == "train" else 0.5
        rows += plan_split(birds, scenes, split, getattr(args, name), correlation, rng)
    sources = {
        "birds": sorted(bird.key for bird in birds),
        "scenes": {
            key: {name: strips[key][split] for split, name in enumerate(SPLITS)}
            for key in sorted(strips)
        },
    }
    with _renamed(args.output) as partial:
        write_dataset(rows, strips, partial, args.size, args.seed)
        text = json.dumps(sources, indent=2) + "\n"
        (partial / "sources.json").write_text(text, encoding="utf-8")
    print(f"stamps {_counts(birds)}, photographs {_counts(scenes)}, in each of the splits")
    for split, name in enumerate(SPLITS):
        print(f"{name}: {sum(row.split == split for row in rows)} images")


def _counts(sources: list[Source]) -> str:
    water = sum(LABELS[source.label] == "water" for source in sources)
    return f"{len(sources) - water} land / {water} water"


@contextmanager
def _renamed(target: Path) -> Iterator[Path]:
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--birds", type=Path, help=f"folder of the unpacked {BIRD_PACKAGE}")
    parser.add_argument(
        "--scenes", type=Path, nargs="+", help="folders of the unpacked wallpaper packages"
    )
    parser.add_argument(
        "--fetch", action="store_true", help="download the Debian packages to a temporary folder"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (default 64)")
    parser.add_argument("--train", type=int, default=3000, help="images (default 3000)")
    parser.add_argument("--val", type=int, default=600, help="images (default 600)")
    parser.add_argument("--test", type=int, default=1200, help="images (default 1200)")
    parser.add_argument(
        "--correlation",
        type=float,
        default=0.95,
        help="share of the training birds on their own place (default 0.95; 0.5 in val and test)",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    args = parser.parse_args(arguments)
    if args.fetch == bool(args.birds or args.scenes) or bool(args.birds) != bool(args.scenes):
        parser.error("give either --fetch, or both --birds and --scenes")
    for flag, least in (("size", 16), ("train", 1), ("val", 0), ("test", 0), ("seed", 0)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag} must be at least {least}, not {getattr(args, flag)}")
    if not 0 <= args.correlation <= 1:
        parser.error(f"--correlation must lie between 0 and 1, not {args.correlation}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the folder that the command line asks for."""
    args = parse(arguments)
    try:
        if args.output.exists():
            raise UserError(f"--output {args.output} exists already: remove it or name another.")
        with tempfile.TemporaryDirectory() as folder:
            if args.fetch:
                fetch(Path(folder))
                args.birds, args.scenes = Path(folder) / BIRD_PACKAGE, [Path(folder)]
            kinds = {stamp: label for stamp, (label, _) in bird_table().items()}
            places = {key: scene.label for key, scene in scene_table().items()}
            birds = find_sources(kinds, [args.birds], "--birds")
            build(args, birds, find_sources(places, args.scenes, "--scenes"))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
