"""Drawn faces: the same seed gives the same bytes, and what they show can be read off."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from invdiff_pl.data.synthetic.celeba import ATTRIBUTES, RenderedCelebA, render_celeba
from invdiff_pl.data.synthetic.faces import draw_face
from invdiff_pl.data.synthetic.fairface import RenderedFairFace, render_fairface
from invdiff_pl.data.synthetic.looks import FEMININE, MASCULINE, Face
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_folder

BLACK, BLOND = (38.0, 30.0, 30.0), (222.0, 186.0, 98.0)
LIGHT, DARK = (240.0, 198.0, 172.0), (96.0, 62.0, 46.0)


def _mean(face: Face, rows: slice, columns: slice, count: int = 40) -> np.ndarray:
    """Mean colour of a part of many pictures at 32 px, ``[count, 3]``."""
    found = []
    for seed in range(count):
        picture = draw_face(face, 64, 64, 0.46, np.random.default_rng(seed)).resize((32, 32))
        found.append(np.asarray(picture, dtype=float)[rows, columns].mean((0, 1)))
    return np.array(found)


def test_hair_colour_shows_on_the_top_of_the_head() -> None:
    top = slice(7, 9), slice(14, 18)
    for style in (FEMININE, MASCULINE):
        black = _mean(Face(style, BLACK, LIGHT), *top).mean(1)
        blond = _mean(Face(style, BLOND, LIGHT), *top).mean(1)
        assert np.mean(blond > 110) > 0.95
        assert np.mean(black < 110) > 0.95


def test_long_hair_shows_beside_the_neck() -> None:
    beside = slice(19, 22), slice(7, 10)
    long = _mean(Face(FEMININE, BLACK, LIGHT), *beside).mean(1)
    short = _mean(Face(MASCULINE, BLACK, LIGHT), *beside).mean(1)
    assert np.mean(long < 70) > 0.9
    assert np.mean(short > 70) > 0.9


def test_tones_show_on_the_cheeks() -> None:
    cheeks = slice(15, 17), slice(12, 20)
    light = _mean(Face(FEMININE, BLACK, LIGHT), *cheeks).mean(1)
    dark = _mean(Face(FEMININE, BLACK, DARK), *cheeks).mean(1)
    assert light.min() > dark.max()


def test_cues_show_the_style_alike_whatever_the_hair() -> None:
    clothes = slice(26, 31), slice(12, 20)
    for hair in (BLACK, BLOND):
        feminine = _mean(Face(FEMININE, hair, LIGHT, cues=True), *clothes).mean()
        masculine = _mean(Face(MASCULINE, hair, LIGHT, cues=True), *clothes).mean()
        assert feminine > masculine + 30


def test_with_cues_hair_falls_beside_the_neck_of_some_of_either_style() -> None:
    beside = slice(19, 22), slice(9, 11)
    for style, least, most in ((FEMININE, 0.25, 0.75), (MASCULINE, 0.02, 0.45)):
        dark = _mean(Face(style, BLACK, LIGHT, cues=True), *beside, count=100).mean(1) < 70
        assert least < dark.mean() < most


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def draw(name: str, seed: int) -> str:
        root = tmp_path / name
        render_celeba(root / "c", RenderedCelebA(40, 2, 1, 1, seed), progress=False)
        render_fairface(root / "f", RenderedFairFace(32, 2, 1, seed), progress=False)
        return digest_folder(root)

    assert draw("one", 0) == draw("two", 0)
    assert draw("one", 0) != draw("three", 1)


def test_celebas_layout_is_the_published_one(tmp_path: Path) -> None:
    render_celeba(tmp_path / "c", RenderedCelebA(89, 3, 1, 2), progress=False)
    lines = (tmp_path / "c" / "list_attr_celeba.txt").read_text().splitlines()
    assert lines[0] == "24"
    assert len(lines[1].split()) == len(ATTRIBUTES) == 40
    assert all(len(line.split()) == 41 for line in lines[2:])
    first, last = lines[2].split()[0], lines[-1].split()[0]
    assert (first, last) == ("000001.jpg", "000024.jpg")
    partition = (tmp_path / "c" / "list_eval_partition.txt").read_text().split("\n")
    assert [line.split()[1] for line in partition if line].count("1") == 4
    with Image.open(tmp_path / "c" / "img_align_celeba" / first) as picture:
        assert picture.size == (89, 109)


def test_fairfaces_layout_is_the_published_one(tmp_path: Path) -> None:
    render_fairface(tmp_path / "f", RenderedFairFace(32, 6, 1), progress=False)
    table = pd.read_csv(tmp_path / "f" / "fairface_label_train.csv")
    assert list(table.columns) == ["file", "age", "gender", "race", "service_test"]
    assert len(table) == 48
    assert set(table["gender"]) == {"Female", "Male"}
    assert all((tmp_path / "f" / name).is_file() for name in table["file"])
    assert len(list((tmp_path / "f" / "val").glob("*.jpg"))) == 8


@pytest.mark.parametrize("wrong", [{"width": 8}, {"train": 0}, {"test": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(InvDiffError, match=f"^{name}="):
        RenderedCelebA(**wrong)
