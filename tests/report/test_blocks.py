"""Markdown and HTML of a report's parts."""

from pathlib import Path

import pytest
from PIL import Image

from invdiff_pl.report.blocks import (
    Block,
    Heading,
    Picture,
    Strong,
    Table,
    Text,
    to_html,
    to_markdown,
)

EVIL = '<img src=x onerror="alert(1)"> & | `rm` **bold** [a](b)'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a & b.png")
    return tmp_path


def test_html_escapes_every_text(folder: Path) -> None:
    blocks: list[Block] = [
        Heading(EVIL, 1),
        Text(EVIL),
        Table([EVIL], [[EVIL], [Strong(EVIL)]]),
        Picture("a & b.png", EVIL),
    ]
    page = to_html(blocks, folder)
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x onerror=") == 8  # title, heading, text, 3 cells, alt, caption
    assert page.count("<img ") == 1


def test_html_holds_its_pictures_and_may_load_nothing(folder: Path) -> None:
    page = to_html([Picture("a & b.png", "red")], folder)
    assert 'src="data:image/png;base64,iVBOR' in page
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page


def test_marks_in_text_become_html() -> None:
    page = to_html([Text("**Warning:** run `make`")], Path())
    assert "<p><strong>Warning:</strong> run <code>make</code></p>" in page


def test_markdown_cells_cannot_break_the_table_or_become_tags() -> None:
    text = to_markdown([Table(["prompt"], [["a | <b> `c` [d](e)\nf"], [Strong("best")]])])
    assert text.splitlines()[2] == "| a \\| \\<b> \\`c\\` [d]\\(e) f |"
    assert text.splitlines()[3] == "| **best** |"


def test_markdown_quotes_file_names() -> None:
    assert to_markdown([Picture("../a b#1.png", "sheet")]) == "![sheet](../a%20b%231.png)\n"
