"""Data sets of a few images in every layout, written and read."""

from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from invdiff_pl.data.broken import readable_rows
from invdiff_pl.data.celeba import CelebADataModule
from invdiff_pl.data.custom import TableDataModule
from invdiff_pl.data.fairface import FairFaceDataModule
from invdiff_pl.data.images import inspect_image, read_image
from invdiff_pl.data.index import content_digest
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.utils.errors import InvDiffError


def images(folder: Path, names: Sequence[str]) -> None:
    source = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = source.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def _rows(names: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "file_name": names,
            "text": ["a photo of a bird", "a photo of a fish"] * (len(names) // 2),
            "split": [0, 0, 1, 1, 2, 2] * (len(names) // 6),
            "place": ["land", "water", "water", "land"] * (len(names) // 4),
        }
    )


_NAMES = [f"kind {n % 2}/picture {n}.png" for n in range(12)]


def table(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        images(folder, _NAMES)
        rows = _rows(_NAMES)
        path = folder / f"metadata{suffix}"
        if suffix == ".parquet":
            rows.to_parquet(path)
        elif suffix == ".jsonl":
            rows.to_json(path, orient="records", lines=True)
        else:
            rows.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")

    return make


def settings(folder: Path) -> dict:
    return {"root": str(folder), "backbone": "", "resolution": 8, "cache_dir": f"{folder}-cache"}


def read_data(module) -> None:
    index = module.index
    for split in ("train", "val", "test"):
        index.rows(split)
    attributes = module.attributes()
    assert attributes is None or len(attributes) == len(index)
    assert module.attribute_names is not None
    assert all(".." not in Path(name).parts for name in index.files)


def read_table(folder: Path) -> None:
    read_data(
        TableDataModule(attribute_column="place", min_images_per_prompt=1, **settings(folder))
    )


def make_waterbirds(folder: Path) -> None:
    names = [f"00{n % 2}.A_bird/{n}.png" for n in range(12)]
    images(folder, names)
    rows = pd.DataFrame({"img_id": range(12), "img_filename": names, "y": [0, 1] * 6})
    rows["split"], rows["place"] = [0, 0, 1, 1, 2, 2] * 2, [0, 1, 1, 0] * 3
    rows.to_csv(folder / "metadata.csv", index=False)


def make_celeba(folder: Path) -> None:
    names = [f"{n:06d}.jpg" for n in range(1, 25)]
    images(folder, [f"img_align_celeba/{name}" for name in names])
    columns = ["Black_Hair", "Blond_Hair", "Male"]
    lines = [str(len(names)), " ".join(columns)]
    lines += [f"{name}  {1 - 2 * (n % 2)} {2 * (n % 2) - 1} {1 - n // 2 % 2 * 2}"
              for n, name in enumerate(names)]  # fmt: skip
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{name} {n // 4 % 3}" for n, name in enumerate(names)]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


def make_fairface(folder: Path) -> None:
    races = ("White", "East Asian", "Indian", "Black")
    for split, eighths in (("train", 1), ("val", 8)):
        names = [f"{split}/{n}.jpg" for n in range(8 * eighths)]
        (folder / split).mkdir()
        for name in names:
            (folder / name).touch()  # the tables are read here, not the images
        genders = ["Male", "Female"] * 4 * eighths
        rows = pd.DataFrame({"file": names, "age": "20-29", "gender": genders})
        rows["race"] = [race for race in races for _ in range(2)] * eighths
        rows["service_test"] = True
        rows.to_csv(folder / f"fairface_label_{split}.csv", index=False)


def read_celeba(folder: Path) -> None:
    read_data(CelebADataModule(ratio="1:1:1:1", **settings(folder)))


def read_fairface(folder: Path) -> None:
    read_data(FairFaceDataModule(ratio="1:1:1:1:1:1:1:1", **settings(folder)))


def make_images(folder: Path) -> None:
    source = np.random.default_rng(0)
    pixels = source.integers(0, 256, (24, 30, 4), dtype=np.uint8)
    colour, clear = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / "turned.jpg", exif=exif)
    colour.save(folder / "colour.png")
    colour.quantize(16).save(folder / "palette.gif")
    colour.convert("CMYK").save(folder / "cmyk.tif")
    colour.save(folder / "plain.bmp")
    colour.save(folder / "colour.webp")
    clear.save(folder / "clear.png")
    colour.quantize(16).save(folder / "palette.png", transparency=0)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    colour.convert("L").save(folder / "grey.jpg")


def read_images(folder: Path) -> None:
    refusal = None
    for path in sorted(folder.iterdir()):
        facts = inspect_image(path)
        try:
            image = read_image(path, 8)
        except InvDiffError as error:
            assert facts.problem is not None
            refusal = error
        else:
            assert facts.problem is None
            assert image.shape == (3, 8, 8)
    if refusal is not None:
        raise refusal


# Memos are found by the path that they were made for, so these are read from within the folder.


def make_memos(folder: Path) -> None:
    make_waterbirds(folder / "birds")
    read_memos(folder)


def read_memos(folder: Path) -> None:
    with chdir(folder):
        index = WaterbirdsDataModule(**settings(Path("birds"))).index
        content_digest(index.root, index.files, Path("content"))
        rows, _ = readable_rows(index, Path("broken"))
        assert len(rows) > 0


def make_split(folder: Path) -> None:
    make_celeba(folder / "faces")
    read_split(folder)


def read_split(folder: Path) -> None:
    with chdir(folder):
        read_data(CelebADataModule(ratio="1:1:1:1", **settings(Path("faces"))))
