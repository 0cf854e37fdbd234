import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from invdiff_pl.data.synthetic.waterbirds import (
    SPECIES,
    Picture,
    RenderedWaterbirds,
    draw_picture,
    plan_pictures,
    render_waterbirds,
)
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.utils.errors import InvDiffError

SMALL = RenderedWaterbirds(fraction=0.01)
HEADER = ["img_id", "img_filename", "y", "split", "place", "place_filename"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rendered") / "images"
    render_waterbirds(root, SMALL, progress=False)
    return root


def rows_of(root: Path) -> list[dict[str, str]]:
    with (root / "metadata.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def bytes_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def cells(pictures: list[Picture], split: int) -> list[int]:
    counts = Counter((p.kind, p.place) for p in pictures if p.split == split)
    return [counts[kind, place] for kind in (0, 1) for place in (0, 1)]


def test_default_counts_are_the_published_ones() -> None:
    pictures = plan_pictures(RenderedWaterbirds())
    assert cells(pictures, 0) == [3498, 184, 56, 1057]
    assert cells(pictures, 1) == [467, 466, 133, 133]
    assert cells(pictures, 2) == [2255, 2255, 642, 642]


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.75, 1.0])
def test_the_correlation_is_the_share_on_the_own_background(correlation: float) -> None:
    land, out, astray, water = cells(plan_pictures(RenderedWaterbirds(correlation=correlation)), 0)
    assert abs(land - 3682 * correlation) <= 0.5
    assert abs(water - 1113 * correlation) <= 0.5
    assert (land + out, water + astray) == (3682, 1113)


def test_every_species_is_as_frequent_and_as_correlated_as_its_kin() -> None:
    settings = RenderedWaterbirds()
    for split, correlation in enumerate((0.95, 0.5, 0.5)):
        chosen = [p for p in plan_pictures(settings) if p.split == split]
        for kind in (0, 1):
            sizes = Counter(p.species for p in chosen if p.kind == kind)
            at_home = Counter(p.species for p in chosen if p.kind == kind == p.place)
            assert len(sizes) >= 3
            assert max(sizes.values()) - min(sizes.values()) <= 1
            for species, size in sizes.items():
                assert SPECIES[species].kind == kind
                assert abs(at_home[species] - size * correlation) <= 1.5


def test_even_the_smallest_fraction_fills_every_cell() -> None:
    pictures = plan_pictures(RenderedWaterbirds(fraction=1e-6))
    assert all(count >= 1 for split in range(3) for count in cells(pictures, split))


def test_the_folder_has_the_published_layout(folder: Path) -> None:
    header = (folder / "metadata.csv").read_text().splitlines()[0]
    assert header.split(",") == HEADER
    rows, planned = rows_of(folder), plan_pictures(SMALL)
    assert len(rows) == len(planned) == len(list(folder.glob("[0-9][0-9][0-9].*/*.png")))
    assert len({row["img_filename"] for row in rows}) == len({row["img_id"] for row in rows})
    for row, picture in zip(rows, planned, strict=True):
        codes = (int(row["y"]), int(row["split"]), int(row["place"]))
        assert codes == (picture.kind, picture.split, picture.place)
        assert row["place_filename"].startswith(("/f/", "/o/")[picture.place])
        with Image.open(folder / row["img_filename"]) as image:
            assert (image.size, image.mode, image.info) == ((32, 32), "RGB", {})


def test_the_data_module_of_the_published_data_reads_the_folder(folder: Path) -> None:
    data = WaterbirdsDataModule(root=str(folder), backbone="unused", resolution=32)
    index, attributes = data.read_index(), data.read_attributes()
    assert attributes is not None
    assert attributes.tolist() == [p.place for p in plan_pictures(SMALL)]
    named = {"a photo of a mallard", "a photo of an american goldfinch"}
    assert named <= set(index.prompts)
    assert len(set(index.prompts)) == len(SPECIES)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    folder: Path, tmp_path: Path
) -> None:
    render_waterbirds(tmp_path / "again", SMALL, progress=False)
    assert bytes_of(tmp_path / "again") == bytes_of(folder)
    first = plan_pictures(SMALL)[0]
    other = draw_picture(first, RenderedWaterbirds(fraction=0.01, seed=1))
    assert other.tobytes() != draw_picture(first, SMALL).tobytes()


def test_a_picture_does_not_depend_on_what_was_drawn_before(folder: Path) -> None:
    last = plan_pictures(SMALL)[-1]
    with Image.open(folder / last.file) as image:
        assert image.tobytes() == draw_picture(last, SMALL).tobytes()


def test_an_interrupted_rendering_leaves_the_old_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "kept.txt").write_text("old")

    def fail(*_: object) -> Iterator[Image.Image]:
        raise KeyboardInterrupt

    monkeypatch.setattr("invdiff_pl.data.synthetic.waterbirds.draw_picture", fail)
    with pytest.raises(KeyboardInterrupt):
        render_waterbirds(tmp_path / "images", SMALL, progress=False)
    assert bytes_of(tmp_path) == {"images/kept.txt": b"old"}


def probe_accuracy(features: np.ndarray, labels: np.ndarray, ridge: float = 1.0) -> float:
    """Held-out balanced accuracy of ridge regression on labels in {0, 1}."""
    half = len(labels) // 2
    mean, spread = features[:half].mean(0), features[:half].std(0) + 1e-6
    inputs = np.c_[(features - mean) / spread, np.ones(len(features))]
    gram = inputs[:half].T @ inputs[:half] + ridge * np.eye(inputs.shape[1])
    weights = np.linalg.solve(gram, inputs[:half].T @ (2.0 * labels[:half] - 1))
    guess, truth = inputs[half:] @ weights > 0, labels[half:] == 1
    return float((guess[truth].mean() + (~guess[~truth]).mean()) / 2)


def test_the_border_tells_the_place_and_not_the_bird() -> None:
    settings = RenderedWaterbirds()
    evaluation = [p for p in plan_pictures(settings) if p.split == 1]
    order = np.random.default_rng(0).permutation(len(evaluation))
    chosen = [evaluation[i] for i in order[:800]]
    pixels = np.stack([np.asarray(draw_picture(p, settings), np.float64) for p in chosen])
    edges = np.concatenate([pixels[:, :, :2], pixels[:, :, -2:]], axis=2)
    features = edges.mean(2).reshape(len(chosen), -1)  # left and right edge, row by row
    place = np.array([p.place for p in chosen])
    assert probe_accuracy(features, place) > 0.95
    kind = np.array([p.kind for p in chosen])
    assert probe_accuracy(features, kind, ridge=100.0) < 0.65


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("size", 15),
        ("correlation", 1.01),
        ("correlation", float("nan")),
        ("evaluation_correlation", -0.1),
        ("fraction", 0.0),
        ("fraction", 1.5),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_named(setting: str, value: float) -> None:
    with pytest.raises(InvDiffError, match=f"^{setting}={value}"):
        RenderedWaterbirds(**{setting: value})  # type: ignore[arg-type]


TINTED = RenderedWaterbirds(fraction=0.1, tint_correlation=0.8)


def test_a_tint_goes_along_with_the_kind_in_the_same_share_on_each_background() -> None:
    pictures = plan_pictures(TINTED)
    for split, share in ((0, 0.8), (1, 0.5), (2, 0.5)):
        for species in range(len(SPECIES)):
            for place in (0, 1):
                tints = [
                    p.tint == p.kind
                    for p in pictures
                    if (p.split, p.species, p.place) == (split, species, place)
                ]
                assert abs(sum(tints) - share * len(tints)) <= 0.5


def test_a_tint_changes_red_and_blue_and_nothing_else() -> None:
    plain = plan_pictures(RenderedWaterbirds(fraction=0.1))[::40]
    for before, after in zip(plain, plan_pictures(TINTED)[::40], strict=True):
        assert before == replace(after, tint=None)
        first, second = (
            np.asarray(draw_picture(picture, TINTED), dtype=int) for picture in (before, after)
        )
        assert (first[..., 1] == second[..., 1]).all()
        change = (second - first).mean((0, 1))
        assert (change[0] > 0 > change[2]) if after.tint == 0 else (change[0] < 0 < change[2])


def test_the_column_of_tints_is_there_only_with_tints(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    render_waterbirds(root, replace(SMALL, tint_correlation=0.9), progress=False)
    assert list(rows_of(root)[0]) == [*HEADER, "tint"]
    assert list(rows_of(folder)[0]) == HEADER
    with pytest.raises(InvDiffError, match=r"^tint_correlation=2"):
        RenderedWaterbirds(tint_correlation=2.0)
