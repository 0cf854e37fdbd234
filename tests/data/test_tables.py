"""Reading tables as people have them, and what is said of damaged ones."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from invdiff_pl.data.index import index_images
from invdiff_pl.data.tables import check_codes, encode, read_table
from invdiff_pl.utils.errors import InvDiffError

ROWS = [("a/1.png", "a bird", "0"), ("b/2.png", 'a "big", wet bird', "1")]


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _rows(table: pd.DataFrame) -> list[tuple[str, ...]]:
    return list(table.itertuples(index=False, name=None))


def _refusal(path: Path, columns: tuple[str, ...] = ("file", "text")) -> str:
    with pytest.raises(InvDiffError) as caught:
        read_table(path, columns)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'file,text,split\na/1.png,a bird,0\nb/2.png,"a ""big"", wet bird",1\n'),
        ("bom.csv", '\ufefffile,text,split\na/1.png,a bird,0\nb/2.png,"a ""big"", wet bird",1\n'),
        ("crlf.csv", 'file,text,split\r\na/1.png,a bird,0\r\nb/2.png,"a ""big"", wet bird",1'),
        ("blank.csv", 'file,text,split\n\na/1.png,a bird,0\n\nb/2.png,"a ""big"", wet bird",1\n\n'),
        ("space.csv", ' file , text,split \na/1.png , a bird,0\nb/2.png,"a ""big"", wet bird" ,1'),
        ("more.csv", 'x,split,text,file\n1,0,a bird,a/1.png\n2,1,"a ""big"", wet bird",b/2.png\n'),
        ("t.tsv", 'file\ttext\tsplit\na/1.png\ta bird\t0\nb/2.png\t"a ""big"", wet bird"\t1\n'),
        ("t.jsonl", "\n".join(json.dumps({"file": f, "text": t, "split": s}) for f, t, s in ROWS)),
        (
            "number.jsonl",
            '\ufeff{"file":"a/1.png","text":"a bird","split":0}\r\n\r\n'
            '{"split":1,"text":"a \\"big\\", wet bird ","file":"b/2.png","list":[1]}\r\n',
        ),
    ],
)
def test_every_form_of_a_table_gives_the_same_text(name: str, content: str, tmp_path) -> None:
    assert _rows(read_table(_write(tmp_path / name, content), ["file", "text", "split"])) == ROWS


def test_parquet_gives_the_same_text_whatever_the_columns_types(tmp_path) -> None:
    frame = pd.DataFrame(ROWS, columns=["file", "text", "split"]).astype({"split": int})
    frame["file"] = frame["file"].astype("category")
    frame.to_parquet(tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", ["file", "text", "split"])
    assert _rows(table) == ROWS


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install pyarrow" in _refusal(_write(tmp_path / "t.parquet", b"PAR1"))


def test_words_that_pandas_takes_for_missing_stay_words(tmp_path) -> None:
    path = _write(tmp_path / "t.csv", "file,text\nNA,None\nnull,nan\n")
    assert _rows(read_table(path, ["file", "text"])) == [("NA", "None"), ("null", "nan")]


def test_optional_columns_are_read_where_they_are_and_may_be_empty(tmp_path) -> None:
    path = _write(tmp_path / "t.csv", "file,split\n1.png,\n2.png,val\n")
    table = read_table(path, ["file"], ["split", "attribute"])
    assert list(table.columns) == ["file", "split"]
    assert table["split"].tolist() == ["", "val"]


def test_white_space_separated_text_without_a_header_is_read_with_names(tmp_path) -> None:
    path = _write(tmp_path / "list.txt", "2\nMale Young\n1.jpg -1  1\n2.jpg  1 -1\n")
    names = ["file", "Male", "Young"]
    table = read_table(path, ["file", "Male"], separator=r"\s+", names=names, skip_lines=2)
    assert _rows(table) == [("1.jpg", "-1"), ("2.jpg", "1")]
    with pytest.raises(InvDiffError, match="line 3: Male is '-1', expected 0, 1"):
        encode(table["Male"], "Male", {"0": 0, "1": 1}, path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "not a readable table"),
        ("file,text\n", "has no row"),
        ("file,text\n\n\n", "has no row"),
        ("file,words\n1.png,bird\n", "lacks the column 'text'"),
        ("file,text\n1.png,bird\n2.png\n", "line 3: text is empty"),
        (
            "file,text\n1.png,bird\n\n,bird\n,a\n",
            "line 4: file is empty, expected a value (1 other",
        ),
        ('file,text\n1.png,"two\nlines"\n2.png,\n', "line 4: text is empty"),
        ("file,text\n1.png,a red, wet bird\n", "more fields than the header"),
        ("file,text\n1.png,bird\n2.png,a red, wet bird\n", "line 3"),
        ('file,text\n1.png,"bird\n', "not a readable table"),
        ("file,text\n1.png,bird\n2.png,vögel\n".encode("latin-1"), "line 3 is not UTF-8"),
        ("file,text\n1.png,bird\n".encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_a_damaged_csv_is_told_with_its_line_and_column(content, told: str, tmp_path) -> None:
    assert told in _refusal(_write(tmp_path / "t.csv", content))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"file": "1.png", "text": "a"}\n{"file": "2.png"}\n', "line 2: text is empty"),
        ('{"file": "1.png", "text": null}\n', "line 1: text is empty"),
        ('{"file": "1.png", "text": ["a"]}\n', "line 1 is not a JSON object of plain values"),
        ('{"file": "1.png"}\n', "lacks the column 'text'"),
        ('[{"file": "1.png"}]\n', "line 1 is not a JSON object"),
        ('{"file": "1.png", "text": "a"}\n{"file"\n', "line 2 is not a JSON object"),
        ("", "no row"),
        (b'{"file": "\xff"}\n', "line 1 is not UTF-8"),
    ],
)
def test_damaged_json_lines_are_told_with_their_line(content, told: str, tmp_path) -> None:
    assert told in _refusal(_write(tmp_path / "t.jsonl", content))


def test_a_damaged_parquet_file_and_a_folder_are_told(tmp_path) -> None:
    assert "not a readable Parquet" in _refusal(_write(tmp_path / "t.parquet", b"PAR1 no"))
    (tmp_path / "d.csv").mkdir()
    assert "cannot be read" in _refusal(tmp_path / "d.csv")
    assert "is missing" in _refusal(tmp_path / "none.csv")


def test_codes_may_be_written_as_decimals_and_wrong_ones_are_counted(tmp_path) -> None:
    path = _write(tmp_path / "t.csv", "split\n0\n1.0\n2\n")
    codes = check_codes(read_table(path, ["split"])["split"], "split", 3, path)
    assert codes.dtype == np.int64
    assert codes.tolist() == [0, 1, 2]
    path = _write(tmp_path / "t.csv", "split\n0\n1.5\n3\ntrain\n")
    with pytest.raises(InvDiffError, match=r"line 3: split is '1\.5', .* 0 to 2 \(2 other rows"):
        check_codes(read_table(path, ["split"])["split"], "split", 3, path)


def test_values_without_a_code_are_named(tmp_path) -> None:
    path = _write(tmp_path / "t.csv", "race\nWhite\nBlack\nMartian\n")
    values = read_table(path, ["race"])["race"]
    codes = {"White": 0, "Black": 1}
    assert encode(values[:2], "race", codes, path).tolist() == [0, 1]
    with pytest.raises(InvDiffError, match="line 4: race is 'Martian', expected White, Black"):
        encode(values, "race", codes, path)


@pytest.mark.parametrize(
    "name",
    ["../x.png", "a/../../x.png", "/etc/x.png", "a/..", "C:/x.png", "c:x.png", "..\\x.png", "a\\b"],
)
def test_a_name_that_leaves_the_root_is_refused_with_its_line(name: str, tmp_path) -> None:
    path = _write(tmp_path / "t.csv", f"file\n1.png\n{name}\n")
    files = read_table(path, ["file"])["file"]
    with pytest.raises(InvDiffError, match=r"line 3: file is .* outside"):
        index_images(tmp_path, files, ["a", "a"], [0, 0], path)


def test_dots_inside_names_are_no_way_out(tmp_path) -> None:
    files = ["a..b.png", "..a/b.png", "a/b..", "./c/d.png", "c//e.png"]
    index = index_images(tmp_path, files, ["x"] * 5, [0] * 5, tmp_path / "t.csv")
    assert index.files == ("a..b.png", "..a/b.png", "a/b..", "c/d.png", "c/e.png")


def test_a_file_named_twice_is_refused_with_both_lines(tmp_path) -> None:
    path = _write(tmp_path / "t.csv", "file\na/1.png\n2.png\n./a/1.png\n2.png\n")
    files = read_table(path, ["file"])["file"]
    with pytest.raises(InvDiffError, match=r"line 2 and line 4 both name 'a/1\.png' \(1 other"):
        index_images(tmp_path, files, ["a"] * 4, [0] * 4, path)


def test_prompts_are_numbered_in_order_and_may_be_one(tmp_path) -> None:
    table = tmp_path / "t.csv"
    index = index_images(tmp_path, ["1", "2", "3"], ["b", "é", "a"], [0, 1, 2], table)
    assert index.prompts == ("a", "b", "é")
    assert index.prompt_ids.tolist() == [1, 2, 0]
    assert index.splits.tolist() == [0, 1, 2]
    assert index_images(tmp_path, ["1", "2"], ["b", "b"], [0, 0], table).prompts == ("b",)


def test_a_million_rows_are_read_and_indexed_in_seconds(tmp_path) -> None:
    path = tmp_path / "metadata.csv"
    lines = (f"d{i % 100}/{i}.jpg,a photo of bird {i % 6},{i % 3}\n" for i in range(1_000_000))
    with path.open("w") as stream:
        stream.write("file,text,split\n")
        stream.writelines(lines)
    started = time.process_time()
    table = read_table(path, ["file", "text", "split"])
    splits = check_codes(table["split"], "split", 3, path)
    index = index_images(tmp_path, table["file"], table["text"], splits, path)
    assert time.process_time() - started < 20  # about 4 on one slow core
    assert len(index) == 1_000_000
    assert index.prompt_ids[:7].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert index.files[123_456] == "d56/123456.jpg"
