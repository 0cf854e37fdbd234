"""Reading the tables of data sets: CSV, TSV, Parquet and JSON, in their common variants.

Every cell is read as text, stripped of surrounding whitespace, so that a file called ``NA`` or a
prompt ``None`` stays what it is. Errors name the file, the line and the column.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from invdiff_pl.data.table_formats import read_csv, read_json, read_parquet, separator_of
from invdiff_pl.utils.errors import InvDiffError


def read_table(
    path: Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    *,
    separator: str | None = None,
    names: Sequence[str] | None = None,
    skip_lines: int = 0,
) -> pd.DataFrame:
    r"""Read the wanted columns of a table, as text.

    The format follows the file's ending: ``.parquet`` (needs pyarrow), ``.jsonl``, ``.json`` (an
    array of objects), ``.tsv``, and CSV for any other. Text is UTF-8, with or without a byte order
    mark, with any line endings.

    Args:
        path: the table.
        columns: required columns, without an empty cell.
        optional: columns that are read if they exist; cells may be empty.
        separator: separator of a CSV table's fields, such as ``r"\s+"`` for any whitespace; taken
            from its header line, a comma, semicolon, tab or bar, if not given.
        names: names of all columns of a CSV table that has no header line.
        skip_lines: number of lines to skip in a CSV table, before its header or first row.

    Returns:
        text columns; the index is each row's number in the file, from 1 and counting the header;
        rows of blank lines are left out.

    Raises:
        InvDiffError: if the file is missing, unreadable or has no row, a column is missing, or a
            required cell is empty.
    """
    wanted = [*columns, *optional]
    suffix = path.suffix.lower()
    with reading(path):
        if suffix == ".parquet":
            table = read_parquet(path, wanted)
        elif suffix in (".jsonl", ".json"):
            table = read_json(path, wanted)
        else:
            table = read_csv(path, wanted, separator or separator_of(path), names, skip_lines)
    for column in columns:
        if column not in table.columns:
            raise InvDiffError(f"{path} lacks the column {column!r}.")
    if table.empty:
        raise InvDiffError(f"{path} has no row.")
    for column in columns:
        refuse(table[column] == "", table[column], column, "a value", path)
    return table


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the system or the decoder in reading a table into messages of one line.

    Raises:
        InvDiffError: naming the file, and the line that is not UTF-8.
    """
    try:
        yield
    except FileNotFoundError:
        raise InvDiffError(
            f"{path} is missing: DATA must be the folder that holds {path.name}."
        ) from None
    except UnicodeDecodeError:
        raise InvDiffError(
            f"{path}, line {_undecodable_line(path)} is not UTF-8 text: save the table as UTF-8."
        ) from None
    except OSError as error:
        raise InvDiffError(f"{path} cannot be read ({error.strerror or error}).") from None


def check_codes(values: pd.Series, column: str, largest: int, path: Path) -> NDArray[np.int64]:
    """Parse codes from 0 to ``largest - 1``, int64 ``[N]``, from a column of :func:`read_table`.

    Raises:
        InvDiffError: naming the first row with another value.
    """
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64)
    wrong = ~np.isin(numbers, np.arange(largest))
    refuse(wrong, values, column, f"a whole number from 0 to {largest - 1}", path)
    return numbers.astype(np.int64)


def encode(
    values: pd.Series, column: str, codes: Mapping[str, int], path: Path
) -> NDArray[np.int64]:
    """Return the code of each value of a column of :func:`read_table`, int64 ``[N]``.

    Raises:
        InvDiffError: naming the first row with a value that has no code.
    """
    numbers = values.map(dict(codes)).to_numpy(dtype=np.float64)
    known = ", ".join(codes) if len(codes) <= 20 else f"one of {len(codes)} known values"
    refuse(np.isnan(numbers), values, column, known, path)
    return numbers.astype(np.int64)


def refuse(wrong: Any, values: pd.Series, column: str, expected: str, path: Path) -> None:
    """Raise if a column has wrong rows, naming the first of them and the number of others.

    Raises:
        InvDiffError: if any element of ``wrong`` (bool ``[N]``) is true.
    """
    marks = np.asarray(wrong, dtype=bool)
    if not marks.any():
        return
    first, others = int(marks.argmax()), int(marks.sum()) - 1
    more = f" ({others} other row{'s are' if others > 1 else ' is'} also wrong)" if others else ""
    found = repr(str(values.iloc[first])) if values.iloc[first] else "empty"
    raise InvDiffError(
        f"{path}, {place(path, values.index[first])}: {column} is {found}, expected "
        f"{expected}{more}."
    )


def refuse_repeated(values: pd.Series, column: str, path: Path) -> None:
    """Reject values that occur twice in a column of :func:`read_table`.

    Raises:
        InvDiffError: naming the first row that repeats a value.
    """
    refuse(values.duplicated(), values, column, "what no row above it names", path)


def place(path: Path, row: int) -> str:
    """Say where a row of a table is in its file: ``line 7``.

    Args:
        path: path of the table.
        row: number of the row, from 1, as in the index of :func:`read_table`.
    """
    words = {".parquet": "row", ".jsonl": "line", ".json": "entry"}
    if path.is_dir() or path.suffix.lower() in words:
        return f"{words.get(path.suffix.lower(), 'image')} {row}"
    # Quoted cells may hold line breaks, so lines are counted as a CSV reader meets them.
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=separator_of(path))
        before = next((reader.line_num for number, _ in enumerate(reader, 2) if number == row), 0)
    return f"line {before + 1}"


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1
