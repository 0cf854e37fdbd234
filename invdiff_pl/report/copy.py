"""A small copy of a run's report, for documentation."""

import re
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path, read_json, write_text

_WIDEST = 1000  # pixels; a grid is narrower: pixels that were enlarged one by one compress well
_COLOURS = 128
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def copy_report(run_dir: Path, folder: Path) -> None:
    """Write ``README.md`` and its pictures, reduced to a few tens of kilobytes each.

    It names no folder of the machine that the run was made on: the run does not go with the copy.

    Args:
        run_dir: of a run whose report is written.
        folder: is replaced.

    Raises:
        InvDiffError: if the run has no report.
    """
    source = run_dir / "report" / "report.md"
    if not source.is_file():
        raise InvDiffError(f"{source} is missing: finish the run first, with `make train`.")
    replay = f"`{read_json(source.parent / 'report.json')['replay']}`"
    text = source.read_text(encoding="utf-8")
    text = text.replace(replay, "`make replay` of the run folder")
    with atomic_path(folder) as partial:
        partial.mkdir()
        for number, (_, link) in enumerate(_PICTURE.findall(text)):
            file = source.parent / unquote(link)
            name = f"{number}-{re.sub(r'[^A-Za-z0-9.-]', '_', file.name)}"
            _reduce(file, partial / name)
            text = text.replace(f"]({link})", f"]({name})")
        write_text(partial / "README.md", text)


def _reduce(source: Path, target: Path) -> None:
    with Image.open(source) as file:
        image = file.convert("RGB")
    if image.width > _WIDEST:
        height = round(image.height * _WIDEST / image.width)
        image = image.resize((_WIDEST, height), Image.Resampling.LANCZOS)
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
