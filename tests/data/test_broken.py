"""Broken images are named and fatal, or named, counted and left out; links do not lead outside."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from invdiff_pl.data.index import content_digest
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.utils.errors import InvDiffError


def _module(root: Path, **settings) -> WaterbirdsDataModule:
    cache = str(root.parent / "cache")
    settings = {"backbone": "", "resolution": 32, "cache_dir": cache, **settings}
    return WaterbirdsDataModule(root=str(root), **settings)


@pytest.fixture
def damaged(birds: Path, tmp_path: Path) -> tuple[Path, list[int]]:
    """A copy of the data set with four broken images, and their row numbers."""
    root = tmp_path / "damaged"
    shutil.copytree(birds, root)
    index = _module(root).index
    rows = [int(index.rows("train")[row]) for row in (0, 5)]
    rows += [int(index.rows(split)[3]) for split in ("val", "test")]
    missing, empty, truncated, text = (root / index.files[row] for row in rows)
    missing.unlink()
    empty.write_bytes(b"")
    truncated.write_bytes(truncated.read_bytes()[:200])
    text.write_text("not an image")
    return root, rows


def test_by_default_a_broken_image_is_named_and_fatal(damaged) -> None:
    root, rows = damaged
    module = _module(root, content="labelled_images")
    with pytest.raises(InvDiffError, match=module.index.files[rows[2]]):
        module.prepare_data()


def test_skipped_images_are_named_and_counted_and_nothing_else_changes(damaged, capsys) -> None:
    root, rows = damaged
    whole, module = _module(root), _module(root, broken="skip")
    kept = torch.tensor([row for row in range(len(whole.index)) if row not in rows])
    assert module.index.files == tuple(whole.index.files[row] for row in kept.tolist())
    assert module.prompts == whole.prompts
    told = capsys.readouterr().out
    assert f"left out 4 of {len(whole.index)} images" in told
    for row in rows:
        assert told.count(whole.index.files[row]) == 1
    attributes = whole.read_attributes()
    assert attributes is not None
    for split in ("train", "val", "test"):
        prompts, labels = module.labels(split)
        own = kept[whole.index.splits[kept] == ["train", "val", "test"].index(split)]
        assert torch.equal(prompts, whole.index.prompt_ids[own])
        assert torch.equal(labels, attributes[own])  # type: ignore[arg-type]
        assert len(module.images(split)) == len(prompts)


def test_skipped_images_are_looked_for_once(damaged, monkeypatch) -> None:
    root, _ = damaged
    files = _module(root, broken="skip").index.files
    monkeypatch.setattr(
        "invdiff_pl.data.broken.inspect_image", lambda _: pytest.fail("looked at again")
    )
    assert _module(root, broken="skip").index.files == files


def test_a_mended_image_comes_back(damaged) -> None:
    root, rows = damaged
    count = len(_module(root, broken="skip").index)
    Image.new("RGB", (32, 32)).save(root / _module(root).index.files[rows[1]])
    assert len(_module(root, broken="skip").index) == count + 1


def test_without_any_readable_image_nothing_is_skipped(birds, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(birds / "metadata.csv", tmp_path / "images")
    with pytest.raises(InvDiffError, match=r"none of the .* images .* can be read; the first"):
        _ = _module(tmp_path / "images", broken="skip").index


def test_a_prompt_without_training_images_is_named(birds, tmp_path) -> None:
    root = tmp_path / "birds"
    shutil.copytree(birds, root)
    lines = (root / "metadata.csv").read_text().splitlines()
    lines = [
        line if "Mallard" not in line else ",".join([*line.split(",")[:3], "1", "0", ""])
        for line in lines
    ]
    (root / "metadata.csv").write_text("\n".join(lines))
    with pytest.raises(InvDiffError, match="no image of the prompt 'a photo of a mallard' in its"):
        _ = _module(root).index


def test_an_empty_split_is_named(birds, tmp_path) -> None:
    root = tmp_path / "birds"
    shutil.copytree(birds, root)
    lines = (root / "metadata.csv").read_text().splitlines()
    kept = [line for line in lines if line.split(",")[3] != "1"]
    (root / "metadata.csv").write_text("\n".join(kept))
    module = _module(root, content="labelled_images")
    with pytest.raises(InvDiffError, match="no image in its val split"):
        module.prepare_data()


def _linked(birds: Path, tmp_path: Path, target: Path) -> tuple[Path, str]:
    """A copy of the data set in which one image is a link to ``target``."""
    root = tmp_path / "birds"
    shutil.copytree(birds, root)
    index = _module(root).index
    name = index.files[int(index.rows("train")[0])]
    (root / name).unlink()
    (root / name).symlink_to(target)
    return root, name


def test_a_link_out_of_the_folder_is_not_followed(birds, tmp_path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "secret.png")
    root, name = _linked(birds, tmp_path, tmp_path / "secret.png")
    with pytest.raises(InvDiffError, match=f"{name} is a link to .*secret.png, outside"):
        _module(root, content="images").prepare_data()
    assert name not in _module(root, broken="skip").index.files


def test_a_folder_that_links_outside_is_not_followed(birds, tmp_path) -> None:
    root = tmp_path / "birds"
    shutil.copytree(birds, root)
    index = _module(root).index
    folder = (root / index.files[int(index.rows("train")[0])]).parent
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvDiffError, match="outside the data folder"):
        _module(root, content="images").prepare_data()


def test_links_within_the_folder_and_a_linked_folder_are_followed(birds, tmp_path) -> None:
    root, name = _linked(birds, tmp_path, Path("../metadata.csv"))
    (root / "stored.png").write_bytes((birds / name).read_bytes())
    (root / name).unlink()
    (root / name).symlink_to(root / "stored.png")
    link = tmp_path / "link"
    link.symlink_to(root)
    _module(link, content="images").prepare_data()
    index = _module(birds).index
    files = list(index.files)
    assert content_digest(link, files, tmp_path / "a") == content_digest(
        birds, files, tmp_path / "b"
    )


def test_prompts_longer_than_the_text_encoder_takes_are_told(
    birds, tiny_backbone, tmp_path, monkeypatch, capsys
) -> None:
    module = _module(birds, backbone=str(tiny_backbone), cache_dir=str(tmp_path))
    module.conditions()
    assert "warning" not in capsys.readouterr().out
    long = "a photo of a mallard " * 30
    index = module.index
    monkeypatch.setattr(type(module), "prompts", (long, *index.prompts[1:]))
    module.conditions()
    told = capsys.readouterr().out
    assert "does not see the last" in told
    assert told.count("warning") == 1
