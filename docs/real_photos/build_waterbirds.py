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
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from photographs import BIRDS, SCENES
from PIL import Image, ImageEnhance, ImageOps

T = TypeVar("T")

LABELS = ("land", "water")  # of birds (y) and of scenes (place), by their code
SPLITS = ("train", "val", "test")
VAL_SHARE, TEST_SHARE = 0.15, 0.25  # of the stamps, and of the photographs, of each class
COLUMNS = ("img_id", "img_filename", "y", "split", "place", "place_filename")
BIRD_PACKAGE = "tuxpaint-stamps-default"


class UserError(Exception):
    """What the user can mend, in one sentence."""


class Source(NamedTuple):
    """A photograph: the name it has in the tables above, its class and where it lies."""

    key: str
    label: int
    path: Path


class Scene(NamedTuple):
    """A row of the table of scenes; ``region`` in hundredths of width and height."""

    package: str
    label: int
    region: tuple[int, int, int, int]


class Row(NamedTuple):
    """One image to compose."""

    bird: Source
    scene: Source
    split: int


def bird_table() -> dict[str, tuple[int, str]]:
    """Class and species of each stamp, by file name."""
    lines = [line.split() for line in BIRDS.split("\n") if line]
    pairs = [(kind, *bird.split("=")) for kind, *birds in lines for bird in birds]
    return {f"{stamp}.png": (LABELS.index(kind), species) for kind, stamp, species in pairs}


def scene_table() -> dict[str, Scene]:
    """Package, class and region of each photograph, by the end of its path."""
    table = {}
    for package, place, key, *edges in (line.split() for line in SCENES.split("\n") if line):
        left, top, right, bottom = map(int, edges)
        table[key] = Scene(package, LABELS.index(place), (left, top, right, bottom))
    return table


def find_sources(labels: dict[str, int], folders: Sequence[Path], flag: str) -> list[Source]:
    """The photographs of a table that lie anywhere under ``folders``, by name."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{flag} {folder} is not a folder: name one that is, or use --fetch.")
    files = sorted(path.as_posix() for folder in folders for path in folder.resolve().rglob("*.*"))
    found = {key: path for key in labels for path in files if path.endswith(f"/{key}")}
    sources = [Source(key, labels[key], Path(found[key])) for key in sorted(found)]
    for label, name in enumerate(LABELS):
        if (count := sum(source.label == label for source in sources)) < len(SPLITS):
            raise UserError(
                f"{flag} holds {count} of the {name} photographs that this script knows, and each "
                f"split needs one: add the folders of the packages it lists, or use --fetch."
            )
    if missing := sorted(labels.keys() - found.keys()):
        print(f"not found under {flag}, left out: {', '.join(missing)}", file=sys.stderr)
    return sources


def split_sources(sources: list[Source], rng: np.random.Generator) -> list[list[Source]]:
    """Deal the sources of each class to train, val and test, so that no two splits share one."""
    splits: list[list[Source]] = [[] for _ in SPLITS]
    for label in range(len(LABELS)):
        members = [source for source in sources if source.label == label]
        members = [members[i] for i in rng.permutation(len(members))]
        val = max(1, round(VAL_SHARE * len(members)))
        test = max(1, round(TEST_SHARE * len(members)))
        splits[1] += members[:val]
        splits[2] += members[val : val + test]
        splits[0] += members[val + test :]
    return splits


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
    shrink = min(1.0, 4 * size / min(photo.size))
    return _resize(photo, [shrink * side for side in photo.size])


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
    bird: Image.Image, scene: Image.Image, size: int, rng: np.random.Generator
) -> Image.Image:
    """Paste a bird near the centre of a random crop of a scene; RGB, ``size`` x ``size`` px."""
    side = min(scene.size) * rng.uniform(0.4, 1.0)
    left, top = (rng.uniform(0, extent - side) for extent in scene.size)
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


def write_dataset(rows: list[Row], output: Path, size: int, seed: int) -> None:
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
            compose(birds[bird], scenes[scene], size, rng).save(output / name)
            writer.writerow((i + 1, name, bird.label, split, scene.label, f"/{scene.key}"))


def build(args: argparse.Namespace, birds: list[Source], scenes: list[Source]) -> None:
    """Split, plan, compose; write to a temporary name, rename, and report the counts."""
    rng = np.random.default_rng([args.seed, 0])
    by_split = list(zip(split_sources(birds, rng), split_sources(scenes, rng), strict=True))
    rows: list[Row] = []
    sources: dict[str, dict[str, list[str]]] = {}
    for split, (its_birds, its_scenes) in enumerate(by_split):
        name = SPLITS[split]
        correlation = args.correlation if name == "train" else 0.5
        rows += plan_split(its_birds, its_scenes, split, getattr(args, name), correlation, rng)
        sources[name] = {
            "birds": sorted(bird.key for bird in its_birds),
            "scenes": sorted(scene.key for scene in its_scenes),
        }
    with _renamed(args.output) as partial:
        write_dataset(rows, partial, args.size, args.seed)
        text = json.dumps(sources, indent=2) + "\n"
        (partial / "sources.json").write_text(text, encoding="utf-8")
    for split, (its_birds, its_scenes) in enumerate(by_split):
        print(
            f"{SPLITS[split]}: {sum(row.split == split for row in rows)} images, "
            f"stamps {_counts(its_birds)}, photographs {_counts(its_scenes)}"
        )


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


def fetch(folder: Path) -> None:
    """Download the Debian packages and unpack them into ``folder``; nothing is installed."""
    for package in (BIRD_PACKAGE, *sorted({scene.package for scene in scene_table().values()})):
        print(f"fetching {package}", file=sys.stderr)
        unsandboxed = ["-o", "APT::Sandbox::User=root"]  # or apt warns when root runs this
        _run(["apt-get", *unsandboxed, "-qq", "download", package], folder)
        for archive in folder.glob("*.deb"):
            _run(["dpkg", "-x", archive.name, package], folder)
            archive.unlink()


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"--fetch needs {command[0]}, which is not here: use it on Debian, or unpack the "
            "packages elsewhere and name them with --birds and --scenes."
        ) from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())
        raise UserError(
            f"'{' '.join(command)}' failed ({reason}): `apt-get update` may help."
        ) from None


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
