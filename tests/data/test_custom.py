"""A data set of one's own, in every layout that is read."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from invdiff_pl.cli.main import main
from invdiff_pl.data.custom import TableDataModule, deal_splits
from invdiff_pl.utils.errors import InvDiffError

PROMPTS = ("a photo of a mallard", "a photo of a raven")


def _module(root: Path, **settings) -> TableDataModule:
    shared = {"backbone": "", "resolution": 32, "cache_dir": str(root / "cache")}
    return TableDataModule(root=str(root), **{**shared, "min_images_per_prompt": 1, **settings})


def _rows(count: int = 12) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "file_name": [f"images/{number}.png" for number in range(count)],
            "text": [PROMPTS[number % 2] for number in range(count)],
            "split": [("train", "val", "test")[number // 2 % 3] for number in range(count)],
            "weather": [("sunny", "cloudy")[number % 3 == 0] for number in range(count)],
        }
    )


def _save(rows: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_data_set(suffix: str, tmp_path) -> None:
    rows = _rows()
    _save(rows, tmp_path / f"metadata.{suffix}")
    module = _module(tmp_path, attribute_column="weather")
    index, attributes = module.index, module.read_attributes()
    assert index.files == tuple(rows["file_name"])
    assert index.prompts == PROMPTS
    assert [index.prompts[p] for p in index.prompt_ids.tolist()] == rows["text"].tolist()
    assert [("train", "val", "test")[s] for s in index.splits.tolist()] == rows["split"].tolist()
    assert module.attribute_names == ("cloudy", "sunny")
    assert attributes is not None
    assert [module.attribute_names[a] for a in attributes.tolist()] == rows["weather"].tolist()


def test_a_table_of_another_name_and_columns_is_read_with_settings(tmp_path) -> None:
    names = {"file_name": "Bild", "text": "Satz", "split": "Teil", "weather": "Wetter"}
    _save(_rows().rename(columns=names), tmp_path / "tables" / "meins.csv")
    module = _module(
        tmp_path,
        table="tables/meins.csv",
        file_column="Bild",
        prompt_column="Satz",
        split_column="Teil",
        attribute_column="Wetter",
        attribute_names=["sunny", "cloudy", "foggy"],
    )
    assert module.index.files[3] == "tables/images/3.png"  # beside the table
    attributes = module.read_attributes()
    assert attributes is not None
    assert attributes[:4].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_an_imagefolder_with_a_table_in_each_split_folder_is_read(suffix: str, tmp_path) -> None:
    rows = _rows().drop(columns="split")
    for folder, chosen in (
        ("train", slice(0, 8)),
        ("validation", slice(8, 10)),
        ("test", [10, 11]),
    ):
        _save(rows.iloc[chosen], tmp_path / folder / f"metadata.{suffix}")
    module = _module(tmp_path, attribute_column="weather")
    index, attributes = module.index, module.read_attributes()
    assert index.files[0] == "train/images/0.png"
    assert index.files[8] == "validation/images/8.png"
    assert index.splits.tolist() == [0] * 8 + [1] * 2 + [2] * 2
    assert attributes is not None
    assert attributes.tolist() == [int(w == "sunny") for w in rows["weather"]]


def test_without_splits_a_hash_of_the_name_deals_images_and_others_change_nothing(tmp_path) -> None:
    rows = _rows(2000).drop(columns="split")
    _save(rows, tmp_path / "metadata.csv")
    index = _module(tmp_path, val_share=0.2, test_share=0.1).index
    counts = Counter(index.splits.tolist())
    assert abs(counts[1] - 400) < 80  # four standard deviations are 72
    assert abs(counts[2] - 200) < 60
    whole = dict(zip(index.files, index.splits.tolist(), strict=True))
    _save(rows.iloc[::-7], tmp_path / "metadata.csv")
    fewer = _module(tmp_path, val_share=0.2, test_share=0.1).index
    assert all(whole[f] == s for f, s in zip(fewer.files, fewer.splits.tolist(), strict=True))


def test_the_deal_of_a_name_never_changes() -> None:
    dealt = deal_splits([f"{number}.png" for number in range(12)], 0.3, 0.3).tolist()
    assert dealt == DEALT


DEALT = [
    1,
    0,
    0,
    1,
    0,
    1,
    0,
    1,
    0,
    0,
    0,
    0,
]  # as dealt by version 0.1; a change would move images between splits


def test_no_share_leaves_all_images_for_training(tmp_path) -> None:
    _save(_rows().drop(columns="split"), tmp_path / "metadata.csv")
    index = _module(tmp_path, val_share=0.0, test_share=0.0).index
    assert not index.splits.any()


def test_the_attribute_column_is_not_looked_at_for_the_index(tmp_path) -> None:
    rows = _rows()
    _save(rows, tmp_path / "metadata.csv")
    before = _module(tmp_path, attribute_column="weather").index
    rows["weather"] = rows["weather"].to_numpy()[::-1]
    _save(rows, tmp_path / "metadata.csv")
    after = _module(tmp_path).index
    assert before.files == after.files
    assert torch.equal(before.splits, after.splits)
    assert torch.equal(before.prompt_ids, after.prompt_ids)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda rows: rows.drop(columns="text"),
            r"usual name \(text, caption, .*: its columns are 'file_name', 'split', 'weather'; ",
        ),
        (lambda rows: rows.replace("val", "later"), r"line 4: split is 'later', expected train,"),
        (lambda rows: rows.replace("sunny", ""), r"line 3: weather is empty"),
        (lambda rows: rows.replace("sunny", "cloudy"), r"every weather is 'cloudy'"),
        (lambda rows: rows.iloc[:0], "has no row"),
        (lambda rows: rows.replace("train", "val"), "no image in its train split"),
    ],
)
def test_a_wrong_table_is_told_in_one_line(change, told: str, tmp_path) -> None:
    _save(change(_rows()), tmp_path / "metadata.csv")
    module = _module(tmp_path, attribute_column="weather")
    with pytest.raises(InvDiffError, match=told):
        _ = module.index, module.attributes()


def test_values_out_of_the_given_classes_are_named(tmp_path) -> None:
    _save(_rows(), tmp_path / "metadata.csv")
    module = _module(tmp_path, attribute_column="weather", attribute_names=["cloudy", "foggy"])
    with pytest.raises(InvDiffError, match="line 3: weather is 'sunny', expected cloudy, foggy"):
        module.attributes()


def test_a_folder_without_a_table_or_with_two_is_told(tmp_path) -> None:
    with pytest.raises(InvDiffError, match="holds neither a table"):
        _ = _module(tmp_path).index
    _save(_rows(), tmp_path / "metadata.csv")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({}))
    with pytest.raises(InvDiffError, match="holds both"):
        _ = _module(tmp_path).index
    for name in ("val", "dev"):
        _save(_rows(), tmp_path / "folders" / name / "metadata.csv")
    with pytest.raises(InvDiffError, match="both hold the val split"):
        _ = _module(tmp_path / "folders").index


def test_shares_that_leave_nothing_are_refused(tmp_path) -> None:
    with pytest.raises(InvDiffError, match=r"^val_share=0\.5"):
        _module(tmp_path, val_share=0.5, test_share=0.5)


def test_stand_ins_of_ones_own_data_cannot_be_drawn(tmp_path, capsys) -> None:
    assert main(["render", "--experiment", "custom", "--run-dir", str(tmp_path)]) == 2
    assert "give the data set's folder with DATA=" in capsys.readouterr().err


def test_a_handful_of_images_of_a_single_prompt_with_odd_names_is_read(tmp_path) -> None:
    names = ["Möwe 1.png", "鳥.png", "🦆.png"]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / name)
    rows = pd.DataFrame({"file_name": names, "text": ["ein Foto einer Möwe"] * 3})
    _save(rows, tmp_path / "metadata.csv")
    module = _module(tmp_path, content="images", val_share=0.0, test_share=0.0)
    module.prepare_data()
    assert module.prompts == ("ein Foto einer Möwe",)
    images = module.images("train").gather(torch.arange(3))
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
