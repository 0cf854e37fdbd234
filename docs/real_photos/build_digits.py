"""Build a folder of scanned handwriting: numbers whose first figure the prompt names.

The scans are the 5000 figures of MNIST (LeCun et al., Proc. IEEE 86, 1998) that OpenCV's examples
ship, in a Debian package. The hidden attribute is the second figure, a 0 or a 1, or, with
``--hidden slant``, how much a single figure leans: the two fifths of its scans that lean least,
or most.

    python build_digits.py --fetch --output digits
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from compose import SHARES, SPLITS, deal, read_options, renamed, unpacked
from packages import UserError
from PIL import Image

PACKAGE = "opencv-doc"
SHEET = "examples/data/digits.png"
SIDE, COLUMNS_OF_SHEET = 20, 100  # pixels of a scan's side; scans in a row of the sheet
FIRST = (2, 3, 4, 5, 6, 7)
VALUES = {"second": ("0", "1"), "slant": ("upright", "leaning")}
OUTER = 0.4  # share of a figure's scans that counts as upright, and as leaning
COLUMNS = ("file_name", "text", "split", "hidden")


class Row(NamedTuple):
    """One image: scans side by side, and what they show."""

    scans: tuple[int, ...]
    figure: int
    value: int
    split: int


def read_scans(folders: Sequence[Path]) -> np.ndarray:
    """Read all scans, float64 ``[5000, 20, 20]`` in [0, 1], 500 of each figure in order."""
    found = [path for folder in folders for path in folder.rglob("*.png")]
    sheets = [path for path in found if path.as_posix().endswith(f"/{SHEET}")]
    if not sheets:
        raise UserError(
            f"the folders do not hold {SHEET} of {PACKAGE}: name its folder, or --fetch."
        )
    with Image.open(sheets[0]) as image:
        pixels = np.asarray(image.convert("L"), dtype=float) / 255
    rows = pixels.reshape(-1, SIDE, COLUMNS_OF_SHEET, SIDE).swapaxes(1, 2)
    return rows.reshape(-1, SIDE, SIDE)


def slants(scans: np.ndarray) -> np.ndarray:
    """How much each scan leans to the right: covariance of across and up over variance of up."""
    up, across = np.mgrid[SIDE - 1 : -1 : -1, :SIDE]
    weights = scans / scans.sum((1, 2), keepdims=True)
    up = up - (weights * up).sum((1, 2), keepdims=True)
    across = across - (weights * across).sum((1, 2), keepdims=True)
    leaning: np.ndarray = (weights * across * up).sum((1, 2)) / (weights * up**2).sum((1, 2))
    return leaning


def dealt(scans: list[int], rng: np.random.Generator) -> list[list[int]]:
    """Deal scans over the splits, so that none is in two of them."""
    edges = np.cumsum([round(share * len(scans)) for share in SHARES])[:-1]
    return [part.tolist() for part in np.split(rng.permutation(scans), edges)]


def _pools(figure: int, scans: np.ndarray, rng: np.random.Generator) -> list[list[list[int]]]:
    """Return a figure's scans of each split: the upright ones, the leaning ones, all."""
    each = len(scans) // 10
    numbers = range(each * figure, each * (figure + 1))
    leaning = slants(scans[numbers.start : numbers.stop])
    order = [numbers[place] for place in leaning.argsort()]
    outer = round(OUTER * each)
    return [dealt(part, rng) for part in (order[:outer], order[-outer:], order)]


def plan(args: argparse.Namespace, scans: np.ndarray, rng: np.random.Generator) -> list[Row]:
    """Choose the scans of all images, those of a split in random order.

    Even first figures mostly have value 0, odd ones mostly value 1.
    """
    pools = {figure: _pools(figure, scans, rng) for figure in (*FIRST, 0, 1)}
    rows = []
    for split, name in enumerate(SPLITS):
        correlation = args.correlation if name == "train" else 0.5
        planned = []
        for place, figure in enumerate(FIRST):
            count = len(range(place, getattr(args, name), len(FIRST)))
            usual = round(correlation * count)
            for value in (0, 1):
                size = usual if value == figure % 2 else count - usual
                if args.hidden == "slant":
                    chosen = [deal(pools[figure][value][split], size, rng)]
                else:
                    chosen = [deal(pools[each][2][split], size, rng) for each in (figure, value)]
                planned += [Row(each, figure, value, split) for each in zip(*chosen, strict=True)]
        rows += [planned[i] for i in rng.permutation(len(planned))]
    return rows


def drawn(scans: np.ndarray, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw scans side by side near the middle, white on black, ``size`` px square."""
    parts = [scan[:, scan.max(0) > 0.1] for scan in scans]
    gap = np.zeros((SIDE, 2))
    line = np.concatenate([each for part in parts for each in (part, gap)][:-1], axis=1)
    scale = size * min(0.7 / SIDE, 0.9 / line.shape[1]) * rng.uniform(0.85, 1.0)
    shown = Image.fromarray((255 * line).round().astype(np.uint8))
    extents = [max(1, round(scale * extent)) for extent in shown.size]
    shown = shown.resize((extents[0], extents[1]), Image.Resampling.BICUBIC)
    image = Image.new("L", (size, size))
    free = [size - extent for extent in extents]
    image.paste(shown, tuple(round(rng.uniform(0.3, 0.7) * each) for each in free))
    return image


def pictures(scans: np.ndarray, rows: list[Row], size: int, seed: int) -> Iterator[Image.Image]:
    """Yield the images of ``rows``, one by one."""
    for i, row in enumerate(rows):
        yield drawn(scans[list(row.scans)], size, np.random.default_rng([seed, 1, i]))


def write_dataset(args: argparse.Namespace, scans: np.ndarray, output: Path) -> None:
    """Save images and ``metadata.csv``."""
    rows = plan(args, scans, np.random.default_rng([args.seed, 0]))
    (output / "images").mkdir()
    with (output / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        images = pictures(scans, rows, args.size, args.seed)
        for i, (row, image) in enumerate(zip(rows, images, strict=True)):
            name = f"images/{i:05d}.png"
            image.save(output / name)
            prompt = f"a handwritten number that begins with {row.figure}"
            writer.writerow((name, prompt, SPLITS[row.split], VALUES[args.hidden][row.value]))
    for split, name in enumerate(SPLITS):
        print(f"{name}: {sum(row.split == split for row in rows)} images")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--hidden", choices=list(VALUES), default="second", help="hidden attribute (default second)"
    )
    return read_options(parser, arguments, f"of the unpacked {PACKAGE}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the folder that the command line asks for."""
    args = parse(arguments)
    try:
        with unpacked(args.fetch, args.folders or (), {PACKAGE}) as folders:
            scans = read_scans(folders)
        with renamed(args.output) as partial:
            write_dataset(args, scans, partial)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
