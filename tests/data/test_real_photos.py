"""The scripts of docs/real_photos, on pictures that stand in for those of the packages."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from invdiff_pl.utils.files import digest_folder

SCRIPTS = Path(__file__).parents[2] / "docs" / "real_photos"
COUNTS = {"train": 200, "val": 20, "test": 20}
FLAGS = {
    "build_waterbirds": ("--birds", "--scenes"),
    "build_things": ("--folders",),
    "build_digits": ("--folders",),
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = (*FLAGS, "fetch_packages", "photographs")
    return {name: import_module(name) for name in names}


@pytest.fixture
def packages(scripts: dict[str, ModuleType], tmp_path: Path) -> Path:
    """All pictures that the tables name, of noise."""
    source, folder = np.random.default_rng(0), tmp_path / "packages"

    def draw(name: str, width: int, height: int, channels: int) -> None:
        pixels = source.integers(1, 256, (height, width, channels), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(folder / name)

    tables = scripts["photographs"]
    for name in (*tables.bird_table(), *tables.thing_table()):
        draw(f"stamps/{name}", 40, 30, 4)
    for scenes, labels in ((tables.SCENES, tables.LABELS), (tables.GROUNDS, tables.SURFACES)):
        for name in tables.scene_table(scenes, labels):
            draw(f"scenes/{name}", 240, 120, 3)
    draw("opencv/examples/data/digits.png", 2000, 1000, 1)
    return folder


def _build(script: ModuleType, packages: Path, output: Path, *more: str) -> pd.DataFrame:
    words = ["--output", str(output), "--size", "32", *more]
    words += [word for split, count in COUNTS.items() for word in (f"--{split}", str(count))]
    words += [word for flag in FLAGS[script.__name__] for word in (flag, str(packages))]
    script.main(words)
    return pd.read_csv(output / "metadata.csv", dtype=str)


def _usual(table: pd.DataFrame) -> pd.Series:
    """The share of images that have their prompt's usual value, by split; ``train`` is biased."""
    names = table.columns
    columns = ("y", "place") if "place" in names else ("text", names[3])
    prompts, values = (table[column].factorize(sort=True)[0] for column in columns)
    train = table["split"].isin(("0", "train"))
    shares = pd.crosstab(prompts[train], values[train], normalize="index").to_numpy()
    split = table["split"].replace({"0": "train", "1": "val", "2": "test"})
    return pd.Series(shares[prompts, values] > 0.5).groupby(split).mean()


@pytest.mark.parametrize("name", FLAGS)
def test_a_folder_has_as_many_usual_images_as_it_was_asked_for(
    name: str, scripts, packages, tmp_path
) -> None:
    table = _build(scripts[name], packages, tmp_path / "out", "--correlation", "0.9")
    assert sorted(table["split"].value_counts()) == sorted(COUNTS.values())
    usual = _usual(table)
    assert usual["train"] == pytest.approx(0.9, abs=0.02)
    assert (usual[["val", "test"]] - 0.5).abs().max() < 0.1
    file = "img_filename" if "img_filename" in table else "file_name"
    with Image.open(tmp_path / "out" / table[file][0]) as image:
        assert image.size == (32, 32)


@pytest.mark.parametrize("name", FLAGS)
def test_the_same_seed_gives_the_same_files(name: str, scripts, packages, tmp_path) -> None:
    for number, seed in enumerate(("3", "3", "4")):
        _build(scripts[name], packages, tmp_path / f"{number}", "--seed", seed)
    first, same, other = (digest_folder(tmp_path / f"{number}") for number in range(3))
    assert first == same
    assert first != other


@pytest.mark.parametrize("name", FLAGS)
def test_folders_without_the_pictures_are_told_and_nothing_is_written(
    name: str, scripts, tmp_path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"^error: .*--fetch"):
        _build(scripts[name], tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packages_are_fetched_once(scripts, tmp_path, monkeypatch) -> None:
    fetched = []

    def fetch(packages: list[str], folder: Path) -> None:
        fetched.extend(packages)
        for package in packages:
            (folder / package / "usr").mkdir(parents=True)

    monkeypatch.setattr(scripts["fetch_packages"], "fetch", fetch)
    for _ in range(2):
        scripts["fetch_packages"].main(["--output", str(tmp_path / "packages")])
    assert sorted(fetched) == scripts["fetch_packages"].package_names()
    assert sorted(path.name for path in (tmp_path / "packages").iterdir()) == sorted(fetched)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]
    assert {"opencv-doc", "tuxpaint-stamps-default"} < set(fetched)
