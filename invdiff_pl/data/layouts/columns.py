"""Choosing the columns of a table that name the image and its caption."""

from collections.abc import Sequence
from pathlib import Path

from invdiff_pl.utils.errors import InvDiffError

# Common names of these columns; of several, the first in this order is taken.
FILE_COLUMNS = (
    *("file_name", "filename", "file", "image", "image_path", "img_path", "image_file", "img"),
    *("image_name", "path", "filepath", "file_path", "img_filename", "image_id"),
)
CAPTION_COLUMNS = (
    *("text", "caption", "prompt", "description", "captions", "sentence", "comment", "title"),
)


def choose_column(
    path: Path, columns: Sequence[str], given: str | None, usual: Sequence[str], setting: str
) -> str:
    """Choose the column that a setting names or, without it, the first with a common name.

    Args:
        path: path of the table, to be named in errors.
        columns: columns of the table.
        given: value of the setting.
        usual: names that are looked for, in any case.
        setting: setting that names a column, such as ``file_column``.

    Raises:
        InvDiffError: naming the table's columns, if there is no such column.
    """
    if given is not None:
        if given in columns:
            return given
        lacks = f"lacks the column {given!r}"
    else:
        by_name = {name.lower(): name for name in reversed(columns)}
        for name in usual:
            if name in by_name:
                return by_name[name]
        lacks = f"has no column of a usual name ({', '.join(usual[:4])}, …)"
    there = ", ".join(map(repr, columns[:12])) + (", …" if len(columns) > 12 else "")
    raise InvDiffError(
        f"{path} {lacks}: its columns are {there or 'none'}; name the one to read with {setting}=.",
        setting,
    )
