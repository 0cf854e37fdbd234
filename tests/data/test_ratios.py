"""Splits drawn by ratio, from drawn faces in the layouts of CelebA and FairFace."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from invdiff_pl.data.celeba import CelebADataModule
from invdiff_pl.data.fairface import FairFaceDataModule
from invdiff_pl.data.ratios import draw_groups, group_sizes, parse_ratio
from invdiff_pl.data.synthetic.celeba import RenderedCelebA, render_celeba
from invdiff_pl.data.synthetic.fairface import RenderedFairFace, render_fairface
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json


@pytest.fixture(scope="module")
def celeba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("celeba") / "images"
    render_celeba(root, RenderedCelebA(width=40, train=16, val=3, test=4), progress=False)
    return root


@pytest.fixture(scope="module")
def fairface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fairface") / "images"
    render_fairface(root, RenderedFairFace(size=32, train=12, val=14), progress=False)
    return root


def _celeba(root: Path, cache: Path, **settings: Any) -> CelebADataModule:
    return CelebADataModule(
        root=str(root), backbone="", resolution=32, cache_dir=str(cache), **settings
    )


def _fairface(root: Path, cache: Path, **settings: Any) -> FairFaceDataModule:
    return FairFaceDataModule(
        root=str(root), backbone="", resolution=32, cache_dir=str(cache), **settings
    )


def _groups(module: CelebADataModule | FairFaceDataModule, split: str) -> list[int]:
    """Images of each (prompt, class), counted by reading the labels again."""
    rows = module.index.rows(split)
    attributes = module.attributes()
    assert attributes is not None
    cells = module.index.prompt_ids * len(module.attribute_names) + attributes
    return cells[rows].bincount().tolist()


def test_celeba_goes_by_hair_colour_and_gender(celeba: Path, tmp_path: Path) -> None:
    module = _celeba(celeba, tmp_path, ratio="1:4:4:1")
    assert module.prompts == (
        "a photo of a person with black hair",
        "a photo of a person with blond hair",
    )
    assert _groups(module, "train") == [4, 16, 16, 4]
    assert _groups(module, "val") == [3, 3, 3, 3]
    assert _groups(module, "test") == [4, 4, 4, 4]


def test_prompts_and_attributes_are_those_of_the_label_file(celeba: Path, tmp_path: Path) -> None:
    module = _celeba(celeba, tmp_path)
    lines = (celeba / "list_attr_celeba.txt").read_text().splitlines()
    names = lines[1].split()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    attributes = module.attributes()
    assert attributes is not None
    for number, file in enumerate(module.index.files):
        row = rows[Path(file).name]
        assert (row[names.index("Blond_Hair")] == "1") == bool(module.index.prompt_ids[number])
        assert (row[names.index("Male")] == "1") == bool(attributes[number])


def test_fairface_goes_by_gender_and_four_groups(fairface: Path, tmp_path: Path) -> None:
    module = _fairface(fairface, tmp_path)
    assert module.prompts == ("a photo of a man", "a photo of a woman")
    assert _groups(module, "train") == [12, 8, 4, 4, 4, 4, 8, 12]
    for split in ("val", "test"):
        assert len(set(_groups(module, split))) == 1
    table = pd.read_csv(fairface / "fairface_label_train.csv").set_index("file")
    attributes = module.attributes()
    assert attributes is not None
    groups = (
        {"White", "Latino_Hispanic", "Middle Eastern"},
        {"East Asian", "Southeast Asian"},
        {"Indian"},
        {"Black"},
    )
    for row in module.index.rows("train").tolist():
        assert table.loc[module.index.files[row], "race"] in groups[int(attributes[row])]


def test_val_and_test_of_fairface_share_no_image_and_come_from_its_val_folder(
    fairface: Path, tmp_path: Path
) -> None:
    index = _fairface(fairface, tmp_path).index
    files = {s: {index.files[r] for r in index.rows(s).tolist()} for s in ("train", "val", "test")}
    assert not files["val"] & files["test"]
    assert all(name.startswith("val/") for name in files["val"] | files["test"])
    assert all(name.startswith("train/") for name in files["train"])


@pytest.mark.parametrize("margin", ["025", "125"])
def test_fairface_is_read_from_either_margins_folder(
    fairface: Path, tmp_path: Path, margin: str
) -> None:
    folder = tmp_path / "data" / f"fairface-img-margin{margin}-trainval"
    folder.parent.mkdir()
    shutil.copytree(fairface, folder)
    for table in folder.glob("*.csv"):
        shutil.move(table, folder.parent)
    theirs = _fairface(folder.parent, tmp_path / "a").index
    ours = _fairface(fairface, tmp_path / "b").index
    assert theirs.files == tuple(f"{folder.name}/{name}" for name in ours.files)
    assert torch.equal(theirs.prompt_ids, ours.prompt_ids)


def test_kaggles_tables_and_nested_folder_give_the_published_ones_split(
    celeba: Path, tmp_path: Path
) -> None:
    root = tmp_path / "kaggle"
    shutil.copytree(celeba / "img_align_celeba", root / "img_align_celeba" / "img_align_celeba")
    lines = (celeba / "list_attr_celeba.txt").read_text().splitlines()
    rows = [",".join(line.split()) for line in lines[2:]]
    header = "image_id," + ",".join(lines[1].split())
    (root / "list_attr_celeba.csv").write_text("\n".join([header, *rows]) + "\n")
    partition = (celeba / "list_eval_partition.txt").read_text().split("\n")
    rows = [",".join(line.split()) for line in partition if line]
    (root / "list_eval_partition.csv").write_text("\n".join(["image_id,partition", *rows]) + "\n")
    theirs, ours = _celeba(root, tmp_path / "a"), _celeba(celeba, tmp_path / "b")
    assert theirs.index.files == tuple(f"img_align_celeba/{name}" for name in ours.index.files)
    assert torch.equal(theirs.index.splits, ours.index.splits)
    assert torch.equal(theirs.attributes(), ours.attributes())  # type: ignore[arg-type]


def test_png_pictures_are_found(celeba: Path, tmp_path: Path) -> None:
    root = tmp_path / "png"
    shutil.copytree(celeba, root)
    for path in (root / "img_align_celeba").iterdir():
        path.rename(path.with_suffix(".png"))
    index = _celeba(root, tmp_path / "a").index
    assert all(name.endswith(".png") for name in index.files)
    assert all(path.is_file() for path in index.paths(torch.arange(len(index))))


def test_images_of_neither_hair_colour_or_of_both_are_left_out(
    celeba: Path, tmp_path: Path
) -> None:
    root = tmp_path / "changed"
    shutil.copytree(celeba, root)
    table = root / "list_attr_celeba.txt"
    lines = table.read_text().splitlines()
    names = lines[1].split()
    for line, value in ((2, "1"), (3, "-1")):
        cells = lines[line].split()
        cells[1 + names.index("Black_Hair")] = cells[1 + names.index("Blond_Hair")] = value
        lines[line] = " ".join(cells)
    table.write_text("\n".join(lines) + "\n")
    labelled = _celeba(root, tmp_path / "a").read_labelled()
    assert len(labelled.files) == len(lines) - 2 - 2
    assert not {"img_align_celeba/000001.jpg", "img_align_celeba/000002.jpg"} & set(labelled.files)


def test_the_index_holds_no_attribute_and_its_counts_stand_beside_it(
    celeba: Path, tmp_path: Path
) -> None:
    _ = _celeba(celeba, tmp_path, ratio="1:2:2:1", train_size=12).index
    (table,) = (tmp_path / "splits").glob("*.csv")
    assert list(pd.read_csv(table).columns) == ["file", "prompt", "split"]
    facts = read_json(table.with_suffix(".json"))
    assert facts["ratio"] == "1:2:2:1"
    assert list(facts["groups"]["train"].values()) == [2, 4, 4, 2]


def test_once_the_split_is_drawn_the_labels_are_not_read_for_training(
    celeba: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Path
) -> None:
    first = _celeba(celeba, tmp_path).index
    monkeypatch.setattr(
        CelebADataModule, "read_labelled", lambda self: pytest.fail("the labels were read")
    )
    module = _celeba(celeba, tmp_path, content="latents")
    module.backbone = str(tiny_backbone)
    module.prepare_data()
    assert module.index.files == first.files
    batches = [batch["prompt"] for batch in module.predict_dataloader()]
    assert torch.equal(torch.cat(batches), first.prompt_ids[first.rows("train")])


def test_the_same_seed_draws_the_same_images_and_another_does_not(
    celeba: Path, tmp_path: Path
) -> None:
    one, again, other = (
        _celeba(celeba, tmp_path / name, train_size=20, split_seed=seed).index
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.files == again.files
    assert one.files != other.files


def test_more_than_there_is_names_the_short_group_and_the_largest_size(
    celeba: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvDiffError, match=r"16 images of .*black hair', male.*at most 40 images"):
        _ = _celeba(celeba, tmp_path, ratio="1:4:4:1", train_size=44).index


def test_a_group_smaller_than_its_part_of_the_ratio_is_named(celeba: Path, tmp_path: Path) -> None:
    with pytest.raises(InvDiffError, match="16 images of the group"):
        _ = _celeba(celeba, tmp_path, ratio="1:17:17:1").index


@pytest.mark.parametrize("ratio", ["1:2:3", "1:2:2:x", "1:0:1:1", "", "1:1:1:1:1", "1:²:1:1"])
def test_what_is_no_ratio_is_refused(ratio: str) -> None:
    with pytest.raises(InvDiffError, match="expected 4 whole numbers from 1 on"):
        parse_ratio(ratio, 2, 2)


def test_sizes_follow_the_ratio_as_closely_as_whole_numbers_can() -> None:
    names = ["a", "b", "c"]
    plenty = np.array([100, 100, 100])
    ratio = np.array([1, 2, 4])
    assert group_sizes(plenty, ratio, 70, names, "").tolist() == [10, 20, 40]
    sizes = group_sizes(plenty, ratio, 50, names, "")
    assert sizes.sum() == 50
    assert np.abs(sizes - 50 * ratio / 7).max() < 1
    assert group_sizes(np.array([9, 30, 37]), ratio, None, names, "").tolist() == [9, 18, 36]


def test_groups_are_drawn_without_replacement_and_evenly() -> None:
    rows = np.arange(100, 160)
    groups = np.repeat([0, 1, 2], [10, 20, 30])
    sizes = np.array([5, 20, 3])
    drawn = np.zeros(60)
    for seed in range(400):
        chosen = draw_groups(rows, groups, sizes, np.random.default_rng(seed))
        assert len(set(chosen.tolist())) == 28
        assert np.bincount(groups[chosen - 100]).tolist() == [5, 20, 3]
        drawn[chosen - 100] += 1
    # Each image of a group is as likely as any other: 4.5 standard errors.
    for group, share in ((0, 5 / 10), (2, 3 / 30)):
        error = (share * (1 - share) / 400) ** 0.5
        assert np.abs(drawn[groups == group] / 400 - share).max() < 4.5 * error


def test_missing_tables_and_pictures_are_told_in_one_line(celeba: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvDiffError, match=r"list_attr_celeba\.txt"):
        _ = _celeba(empty, tmp_path / "a").index
    with pytest.raises(InvDiffError, match=r"fairface_label_train\.csv"):
        _ = _fairface(empty, tmp_path / "a").index
    for table in celeba.glob("*.txt"):
        shutil.copy(table, empty)
    with pytest.raises(InvDiffError, match=r"img_align_celeba\.zip"):
        _ = _celeba(empty, tmp_path / "a").index


def test_an_image_without_a_partition_is_named(celeba: Path, tmp_path: Path) -> None:
    root = tmp_path / "changed"
    shutil.copytree(celeba, root)
    table = root / "list_eval_partition.txt"
    table.write_text("\n".join(table.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(InvDiffError, match=r"no row for 000001\.jpg"):
        _ = _celeba(root, tmp_path / "a").index
