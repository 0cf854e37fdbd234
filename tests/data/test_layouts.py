"""Folders and tables of one's own as people have them: what is read, or what is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from invdiff_pl.data.custom import TableDataModule
from invdiff_pl.utils.errors import InvDiffError

DOG = "a photo of a dog"
Rows = dict[str, str]  # prompt by file


def _module(root: Path, **settings) -> TableDataModule:
    shared = {"backbone": "", "resolution": 32, "cache_dir": str(root.parent / "cache")}
    return TableDataModule(root=str(root), **{**shared, "min_images_per_prompt": 1, **settings})


def _rows(root: Path, **settings) -> Rows:
    shares = {"val_share": 0.0, "test_share": 0.0}
    index = _module(root, **{**shares, **settings}).index
    assert index.root == root
    assert all((root / name).is_file() for name in index.files)
    prompts = [index.prompts[number] for number in index.prompt_ids.tolist()]
    return dict(zip(index.files, prompts, strict=True))


def _pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (33, 33), (number, 0, 0)).save(folder / name)


def _lines(path: Path, *rows: dict[str, str]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def usual_columns(root: Path) -> Rows:
    _pictures(root, "0.png", "1.png")
    rows = [{"Image": f"{n}.png", "note": "x", "Caption": DOG} for n in range(2)]
    _lines(root / "metadata.jsonl", *rows)
    return {"0.png": DOG, "1.png": DOG}


def another_table_and_a_folder_beside_it(root: Path) -> Rows:
    _pictures(root, "images/a0.png", "images/a1.png")
    (root / "captions.csv").write_text(f"image, caption\na0.png, {DOG}\na1.png, {DOG}\n")
    (root / "README.txt").write_text("not a table\n")
    return {"images/a0.png": DOG, "images/a1.png": DOG}


def names_that_repeat_the_folder(root: Path) -> Rows:
    _pictures(root, "train/0.png", "train/1.png")
    rows = [{"file_name": f"train/{n}.png", "text": DOG} for n in range(2)]
    _lines(root / "train" / "metadata.jsonl", *rows)
    return {"train/0.png": DOG, "train/1.png": DOG}


def a_json_array(root: Path) -> Rows:
    _pictures(root, "0.png")
    (root / "metadata.json").write_text(json.dumps([{"file_name": "0.png", "text": DOG}]))
    return {"0.png": DOG}


def semicolons(root: Path) -> Rows:
    _pictures(root, "0.png", "1.png")
    (root / "metadata.csv").write_text('file_name;text\n0.png;a dog, outdoors\n1.png;"a; b"\n')
    return {"0.png": "a dog, outdoors", "1.png": "a; b"}


def bars(root: Path) -> Rows:
    _pictures(root, "flickr/0.png")
    (root / "results.csv").write_text("image_name| comment_number| comment\n0.png| 0| a dog\n")
    return {"flickr/0.png": "a dog"}


def tables_named_after_the_splits(root: Path) -> Rows:
    _pictures(root, "0.png", "1.png")
    for number, split in enumerate(("train", "test")):
        (root / f"{split}.csv").write_text(f"path,prompt\n{number}.png,{DOG}\n")
    return {"0.png": DOG, "1.png": DOG}


def caption_files(root: Path) -> Rows:
    _pictures(root, "10_dog/0.png", "10_dog/1.png", "10_dog/2.png")
    (root / "10_dog/0.txt").write_text("\na dog, grass\nsecond line\n")
    (root / "10_dog/1.caption").write_text("a dog")
    return {
        "10_dog/0.png": "a dog, grass",
        "10_dog/1.png": "a dog",
        "10_dog/2.png": DOG,  # by its folder's name
    }


def class_folders(root: Path) -> Rows:
    _pictures(root, "train/cat/0.png", "train/golden_retriever/0.png", ".hidden/cat/1.png")
    _pictures(root, "train/001.Mallard/0.png", "train/3.5 inch/0.png")
    return {
        "train/001.Mallard/0.png": "a photo of a Mallard",
        "train/3.5 inch/0.png": "a photo of a 3.5 inch",
        "train/cat/0.png": "a photo of a cat",
        "train/golden_retriever/0.png": "a photo of a golden retriever",
    }


LAYOUTS = (
    usual_columns,
    another_table_and_a_folder_beside_it,
    names_that_repeat_the_folder,
    a_json_array,
    semicolons,
    bars,
    tables_named_after_the_splits,
    caption_files,
    class_folders,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_layout_is_read_by_itself(layout: Callable[[Path], Rows], tmp_path) -> None:
    root = tmp_path / "my data (2024)"
    root.mkdir()
    expected = layout(root)
    assert _rows(root) == expected


def test_class_folders_of_several_splits_tell_the_splits_and_take_a_template(tmp_path) -> None:
    _pictures(tmp_path, "train/cat/0.png", "valid/cat/1.png", "test/dog/2.png", "train/dog/3.png")
    module = _module(tmp_path, prompt_template="{}, a pet")
    assert module.index.prompts == ("cat, a pet", "dog, a pet")
    splits = dict(zip(module.index.files, module.index.splits.tolist(), strict=True))
    assert splits["valid/cat/1.png"] == 1
    assert splits["test/dog/2.png"] == 2
    assert splits["train/dog/3.png"] == splits["train/cat/0.png"] == 0


def test_names_are_looked_for_beyond_the_first(tmp_path) -> None:
    _pictures(tmp_path, "images/1.png", "images/2.png")
    (tmp_path / "t.csv").write_text("".join(["file,text\n", *(f"{n}.png,x\n" for n in range(3))]))
    assert _module(tmp_path).read_index().files[0] == "images/0.png"  # missing, and told as such


def several_tables(root: Path) -> None:
    (root / "a.csv").write_text("file,text\n")
    (root / "b.csv").write_text("file,text\n")


def nothing(root: Path) -> None:
    (root / "README.md").write_text("…")


def linked_folder(root: Path) -> None:
    other = root.parent / "elsewhere"
    _pictures(other, "cat/0.png")
    (root / "photos").symlink_to(other)


def flat_pictures(root: Path) -> None:
    _pictures(root, "0.png", "1.png")


def half_captioned(root: Path) -> None:
    _pictures(root, "0.png", "1.png")
    (root / "0.txt").write_text("a dog")


def hub_cache(root: Path) -> None:
    _pictures(root, "datasets--me--birds/snapshots/0123/0.png")


def unknown_columns(root: Path) -> None:
    (root / "metadata.csv").write_text("bild;satz\n0.png;a dog\n")


def json_object(root: Path) -> None:
    (root / "metadata.json").write_text('{"images": []}')


def several_captions(root: Path) -> None:
    _pictures(root, "0.png")
    (root / "captions.txt").write_text("image,caption\n0.png,a dog\n0.png,a wet dog\n")


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (several_tables, r"several tables \(a\.csv, b\.csv\): name the one .* table="),
        (nothing, "holds neither a table .* nor an image: DATA must be"),
        (linked_folder, r"photos is a link, which is followed with links=follow only"),
        (
            flat_pictures,
            r"2 of its 2 images have no caption \(the first is 0\.png\): .*pro",
        ),
        (half_captioned, r"1 of its 2 images have no caption \(the first is 1\.png\)"),
        (
            hub_cache,
            r"give the folder of one snapshot, \S*snapshots/0123, and links=follow",
        ),
        (unknown_columns, r"its columns are 'bild', 'satz'; name .* file_column="),
        (json_object, "holds no JSON array: expected one object per image"),
        (
            several_captions,
            r"line 2 and line 3 both name '0\.png': .*captions=first or all",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_read_is_told_in_one_line(layout, told: str, tmp_path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    layout(root)
    with pytest.raises(InvDiffError, match=told) as caught:
        _ = _module(root).index
    assert "\n" not in str(caught.value)


def test_links_out_of_the_folder_are_read_where_that_is_asked_for(tmp_path) -> None:
    root, other = tmp_path / "snapshot", tmp_path / "blobs"
    root.mkdir()
    _pictures(other, "a.png")
    (root / "0.png").symlink_to(other / "a.png")
    _lines(root / "metadata.jsonl", {"file_name": "0.png", "text": DOG})
    settings = {"content": "images", "val_share": 0.0, "test_share": 0.0}
    with pytest.raises(InvDiffError, match=r"outside the data folder.* with links=follow"):
        _module(root, **settings).prepare_data()
    module = _module(root, **settings, links="follow")
    module.prepare_data()
    assert len(module.images("train")) == 1


def test_linked_folders_are_looked_into_once_where_that_is_asked_for(tmp_path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    linked_folder(root)
    (root / "photos" / "back").symlink_to(root)
    assert _rows(root, links="follow") == {"photos/cat/0.png": "a photo of a cat"}


def test_a_table_elsewhere_names_images_of_the_root(tmp_path) -> None:
    root = tmp_path / "pictures"
    _pictures(root, "images/0.png")
    (tmp_path / "mine.csv").write_text(f"image,text\n0.png,{DOG}\n")
    assert _rows(root, table=str(tmp_path / "mine.csv")) == {"images/0.png": DOG}


def test_an_attribute_needs_a_table(tmp_path) -> None:
    _pictures(tmp_path, "cat/0.png", "dog/0.png")
    module = _module(tmp_path, attribute_column="weather")
    with pytest.raises(InvDiffError, match=r"weather: .* has no table"):
        module.attributes()


def test_attributes_follow_the_rows_that_are_kept(tmp_path) -> None:
    _pictures(tmp_path, *(f"{n}.png" for n in range(4)))
    rows = pd.DataFrame(
        {
            "file_name": [f"{n}.png" for n in range(4)],
            "text": ["a nurse", "a tree", "a doctor", "a nurse"],
            "sky": ["grey", "blue", "blue", "grey"],
        }
    )
    rows.to_csv(tmp_path / "metadata.csv", index=False)
    settings = {"prompts_from": "words:nurse,doctor", "val_share": 0.0, "test_share": 0.0}
    module = _module(tmp_path, attribute_column="sky", **settings)
    assert module.index.files == ("0.png", "2.png", "3.png")
    attributes = module.attributes()
    assert attributes is not None
    assert [module.attribute_names[code] for code in attributes.tolist()] == [
        "grey",
        "blue",
        "grey",
    ]


def test_a_file_name_that_no_system_takes_is_a_broken_image(tmp_path, capsys) -> None:
    root = tmp_path / "pictures"
    _pictures(root, "a.png", "b.png")
    names = ("x" * 300 + ".png", "a.png", "b.png")
    _lines(root / "metadata.jsonl", *({"file_name": name, "text": DOG} for name in names))
    index = _module(root, val_share=0.0, test_share=0.0, broken="skip").index
    assert list(index.files) == ["a.png", "b.png"]
    assert names[0] in capsys.readouterr().out
