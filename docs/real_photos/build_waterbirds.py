"""Build a folder in the Waterbirds layout from real photographs: bird cut-outs pasted on scenes.

Waterbirds (Sagawa et al., "Distributionally Robust Neural Networks", ICLR 2020) pastes birds of
CUB on scenes of Places. This script does the same with photographs that Debian packages ship:
the bird stamps of Tux Paint and the photographic wallpapers of several desktops.

    python build_waterbirds.py --fetch --output waterbirds_photos
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from compose import (
    SPLITS,
    Row,
    Strips,
    add_options,
    check_options,
    counts,
    pictures,
    plan,
    renamed,
    unpacked,
    write_sources,
)
from packages import Source, UserError, find_sources
from photographs import LABELS, SCENES, STAMP_PACKAGE, bird_table, scene_table

COLUMNS = ("img_id", "img_filename", "y", "split", "place", "place_filename")


def write_dataset(rows: list[Row], strips: Strips, output: Path, size: int, seed: int) -> None:
    """Compose and save the images of ``rows`` and ``metadata.csv`` in the published layout."""
    species = {stamp: name for stamp, (_, name) in bird_table().items()}
    number = {name: i + 1 for i, name in enumerate(sorted(set(species.values())))}
    images = pictures(rows, strips, scene_table(SCENES, LABELS), size, seed)
    drawn: Counter[str] = Counter()
    with (output / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i, ((bird, scene, split), image) in enumerate(zip(rows, images, strict=True)):
            kind = species[bird.key]
            drawn[kind] += 1
            name = f"{number[kind]:03d}.{kind}/{kind}_{drawn[kind]:04d}.png"
            (output / name).parent.mkdir(exist_ok=True)
            image.save(output / name)
            writer.writerow((i + 1, name, bird.label, split, scene.label, f"/{scene.key}"))


def build(args: argparse.Namespace, birds: list[Source], scenes: list[Source]) -> None:
    """Plan, compose and write the images, and report the counts."""
    rows, strips = plan(args, birds, scenes, homes=range(len(LABELS)))
    with renamed(args.output) as partial:
        write_dataset(rows, strips, partial, args.size, args.seed)
        write_sources(partial, birds, scenes, strips, "birds")
    told = f"stamps {counts(birds, LABELS)}, photographs {counts(scenes, LABELS)}"
    print(f"{told}, in each of the splits")
    for split, name in enumerate(SPLITS):
        print(f"{name}: {sum(row.split == split for row in rows)} images")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--birds", type=Path, help=f"folder of the unpacked {STAMP_PACKAGE}")
    parser.add_argument(
        "--scenes", type=Path, nargs="+", help="folders of the unpacked wallpaper packages"
    )
    add_options(parser, train=3000, val=600, test=1200)
    args = parser.parse_args(arguments)
    if args.fetch == bool(args.birds or args.scenes) or bool(args.birds) != bool(args.scenes):
        parser.error("give either --fetch, or both --birds and --scenes")
    check_options(parser, args)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the folder that the command line asks for."""
    args = parse(arguments)
    kinds = {stamp: label for stamp, (label, _) in bird_table().items()}
    table = scene_table(SCENES, LABELS)
    places = {key: scene.label for key, scene in table.items()}
    packages = {STAMP_PACKAGE, *(scene.package for scene in table.values())}
    try:
        with unpacked(args.fetch, [*(args.scenes or ())], packages) as folders:
            stamps = [folders[0] / STAMP_PACKAGE] if args.fetch else [args.birds]
            birds = find_sources(kinds, LABELS, stamps, "--birds")
            build(args, birds, find_sources(places, LABELS, folders, "--scenes"))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
