"""Build a folder of things on surfaces from real photographs: fruit, vegetables and animals.

Fruit and vegetables mostly lie on something bare (wood, stone, metal), hoofed and furry animals
mostly stand among plants. Cut-outs are stamps from Tux Paint, surfaces are photographic wallpapers;
both come from Debian packages. The prompt names the kind; the surface is the hidden attribute.

    python build_things.py --fetch --output things
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from compose import (
    SPLITS,
    Row,
    Strips,
    counts,
    pictures,
    plan,
    read_options,
    renamed,
    unpacked,
    write_sources,
)
from packages import Source, UserError, find_sources
from photographs import GROUNDS, HOMES, KINDS, STAMP_PACKAGE, SURFACES, scene_table, thing_table

COLUMNS = ("file_name", "text", "split", "surface")


def write_dataset(rows: list[Row], strips: Strips, output: Path, size: int, seed: int) -> None:
    """Compose and save the images of ``rows`` and ``metadata.csv``."""
    (output / "images").mkdir()
    images = pictures(rows, strips, scene_table(GROUNDS, SURFACES), size, seed)
    with (output / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i, ((thing, scene, split), image) in enumerate(zip(rows, images, strict=True)):
            name = f"images/{i:05d}.png"
            image.save(output / name)
            prompt = f"a photo of a {KINDS[thing.label]}"
            writer.writerow((name, prompt, SPLITS[split], SURFACES[scene.label]))


def build(args: argparse.Namespace, things: list[Source], scenes: list[Source]) -> None:
    """Plan, compose and write the images, and report the counts."""
    rows, strips = plan(args, things, scenes, [SURFACES.index(home) for home in HOMES])
    with renamed(args.output) as partial:
        write_dataset(rows, strips, partial, args.size, args.seed)
        write_sources(partial, things, scenes, strips, "things")
    print(f"stamps {counts(things, KINDS)}, photographs {counts(scenes, SURFACES)}")
    for split, name in enumerate(SPLITS):
        print(f"{name}: {sum(row.split == split for row in rows)} images")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    return read_options(parser, arguments, "of the unpacked packages")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the folder that the command line asks for."""
    args = parse(arguments)
    table = scene_table(GROUNDS, SURFACES)
    surfaces = {key: scene.label for key, scene in table.items()}
    packages = {STAMP_PACKAGE, *(scene.package for scene in table.values())}
    try:
        with unpacked(args.fetch, args.folders or (), packages) as folders:
            things = find_sources(thing_table(), KINDS, folders, "--folders")
            build(args, things, find_sources(surfaces, SURFACES, folders, "--folders"))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
