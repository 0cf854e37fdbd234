"""What a report is made of, and how it is written as Markdown and as one HTML file."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

_SHORT = 24  # characters of a cell that is kept on one line
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2024; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d8dce0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #e4e7ea; text-align: left; }
th { border-bottom: 2px solid #9aa3ab; } .short { white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #59636e; font-size: 0.9rem; } code { background: #f1f3f5; padding: 0 0.2rem; }
"""


class Strong(str):
    """A cell to be set in bold."""

    __slots__ = ()


@dataclass(frozen=True)
class Heading:
    """A heading; ``level`` 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; ``**…**`` and backquotes mean what they mean in Markdown."""

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
        file: relative to the report's folder.
        caption: below it, or in its place where it cannot be seen.
    """

    file: str
    caption: str


Block = Heading | Text | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as GitHub-flavoured Markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as one HTML page that needs no other file.

    All text is escaped, and the page may load nothing and run nothing.

    Args:
        blocks: of the report.
        folder: that the pictures' files are relative to.
    """
    titles = [block.text for block in blocks if isinstance(block, Heading) and block.level == 1]
    title = html.escape(titles[0] if titles else "Report")
    body = "\n".join(_html(block, folder) for block in blocks)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


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
    """Text as a cell of a Markdown table, on one line, with nothing in it taken for markup."""
    escaped = re.sub(r"([\\|<*`])", r"\\\1", text).replace("](", "]\\(").replace("\n", " ")
    return f"**{escaped}**" if isinstance(text, Strong) else escaped


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Picture(file, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            words = html.escape(caption)
            return (
                f'<figure><img alt="{words}" src="data:image/png;base64,{data}">'
                f"<figcaption>{words}</figcaption></figure>"
            )
        case Table(header, rows):
            names = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            head = f"<thead><tr>{names}</tr></thead>" if any(header) else ""
            body = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
            return f'<div class="wide"><table>{head}\n<tbody>{body}</tbody></table></div>'


def _html_cell(cell: str) -> str:
    text = html.escape(cell)
    kind = ' class="short"' if len(cell) <= _SHORT else ""
    return f"<td{kind}>{f'<strong>{text}</strong>' if isinstance(cell, Strong) else text}</td>"


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
