"""The blocks of a report, and writing them as Markdown and as one HTML file."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup, escape

from invdiff_pl.utils.templates import render


class Strong(str):
    """A cell to be set in bold."""

    __slots__ = ()
    strong = True


@dataclass(frozen=True)
class Heading:
    """A heading; ``level`` 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, in which ``**…**`` and backquotes have their Markdown meaning."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of plain cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        file: path relative to the report's folder.
        caption: caption below the picture, or in its place where it cannot be seen.
    """

    file: str
    caption: str


Block = Heading | Text | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """Write blocks as GitHub-flavoured Markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """Write blocks as one HTML page that needs no other file.

    All text is escaped, and the page may load nothing and run nothing.

    Args:
        blocks: blocks of the report.
        folder: folder that the pictures' paths are relative to.
    """
    titles = [block.text for block in blocks if isinstance(block, Heading) and block.level == 1]

    def source(file: str) -> str:
        return f"data:image/png;base64,{base64.b64encode((folder / file).read_bytes()).decode()}"

    return render(
        "report.html",
        title=titles[0] if titles else "Report",
        blocks=[(type(block).__name__, block) for block in blocks],
        marked=_marked,
        source=source,
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Picture(file, caption):
            return f"![{caption}]({quote(file)})"
        case Table(header, rows):
            lines = [_cells(header), _cells(["---"] * len(header)), *map(_cells, rows)]
            return "\n".join(lines)


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell(text) for text in cells) + " |"


def cell(text: str) -> str:
    """Escape text as a cell of a Markdown table, on one line, with nothing taken for markup."""
    escaped = re.sub(r"([\\|<*`])", r"\\\1", text).replace("](", "]\\(").replace("\n", " ")
    return f"**{escaped}**" if isinstance(text, Strong) else escaped


def _marked(text: str) -> Markup:
    """Convert a text's Markdown marks to HTML."""
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text)))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", escaped))
