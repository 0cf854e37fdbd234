"""Reading the tables of data sets: CSV, TSV, Parquet and JSON lines, as people have them on disk.

Every cell is read as text, stripped of surrounding whitespace, so that a file called ``NA`` or a
prompt ``None`` stays what it is. Whatever is wrong is told with file, line and column.
"""

import csv
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from invdiff_pl.utils.errors import InvDiffError

SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl")
# Wide tables are cut down to the wanted columns a chunk at a time, which bounds memory.
_CHUNK_ROWS = 100_000


def read_table(
    path: Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    *,
    separator: str | None = None,
    names: Sequence[str] | None = None,
    skip_lines: int = 0,
) -> pd.DataFrame:
    r"""The wanted columns of a table, as text.

    The format follows the file's ending: ``.parquet`` (needs pyarrow), ``.jsonl``, ``.tsv``, and
    CSV for any other. Text is UTF-8, with or without a byte order mark, with any line endings.

    Args:
        path: the table.
        columns: that must be there, without an empty cell.
        optional: that are read where they are there; cells may be empty.
        separator: of a CSV table's fields, if not a comma; ``r"\s+"`` for any whitespace.
        names: of all columns of a CSV table that has no header line.
        skip_lines: of a CSV table, before its header or first row.

    Returns:
        text columns; the index is each row's number in the file, from 1 and counting the header;
        rows of blank lines are left out.

    Raises:
        InvDiffError: if the file is missing, unreadable or has no row, a column is missing, or a
            required cell is empty.
    """
    wanted = [*columns, *optional]
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table = _read_parquet(path, wanted)
        elif suffix == ".jsonl":
            table = _read_json_lines(path, wanted)
        else:
            separator = separator or ("\t" if suffix == ".tsv" else ",")
            table = _read_csv(path, wanted, separator, names, skip_lines)
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
    for column in columns:
        if column not in table.columns:
            raise InvDiffError(f"{path} lacks the column {column!r}.")
    if table.empty:
        raise InvDiffError(f"{path} has no row.")
    for column in columns:
        refuse(table[column] == "", table[column], column, "a value", path)
    return table


def check_codes(values: pd.Series, column: str, largest: int, path: Path) -> NDArray[np.int64]:
    """Codes from 0 to ``largest - 1``, int64 ``[N]``, from a column of :func:`read_table`.

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
    """The code of each value of a column of :func:`read_table`, int64 ``[N]``.

    Raises:
        InvDiffError: naming the first row with a value that has no code.
    """
    numbers = values.map(dict(codes)).to_numpy(dtype=np.float64)
    known = ", ".join(codes) if len(codes) <= 20 else f"one of {len(codes)} known values"
    refuse(np.isnan(numbers), values, column, known, path)
    return numbers.astype(np.int64)


def refuse(wrong: Any, values: pd.Series, column: str, expected: str, path: Path) -> None:
    """Name the first wrong row of a column, if there is one, and how many others are wrong.

    Raises:
        InvDiffError: if any element of ``wrong`` (bool ``[N]``) is true.
    """
    marks = np.asarray(wrong, dtype=bool)
    if not marks.any():
        return
    first, others = int(marks.argmax()), int(marks.sum()) - 1
    more = f" ({others} other row{'s are' if others > 1 else ' is'} wrong, too)" if others else ""
    found = repr(str(values.iloc[first])) if values.iloc[first] else "empty"
    raise InvDiffError(
        f"{path}, {place(path, values.index[first])}: {column} is {found}, expected "
        f"{expected}{more}."
    )


def refuse_repeated(values: pd.Series, column: str, path: Path) -> None:
    """Refuse a value that an earlier row of a column of :func:`read_table` has, too.

    Raises:
        InvDiffError: naming the first row that repeats one.
    """
    refuse(values.duplicated(), values, column, "what no row above it names", path)


def place(path: Path, row: int) -> str:
    """Where a row of a table stands in its file: ``line 7``.

    Args:
        path: the table.
        row: from 1, as the index of :func:`read_table` counts.
    """
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".jsonl"):
        return f"{'row' if suffix == '.parquet' else 'line'} {row}"
    # Quoted cells may hold line breaks, so lines are counted as a CSV reader meets them.
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if suffix == ".tsv" else ",")
        before = next((reader.line_num for number, _ in enumerate(reader, 2) if number == row), 0)
    return f"line {before + 1}"


def _read_csv(
    path: Path, wanted: list[str], separator: str, names: Sequence[str] | None, skip_lines: int
) -> pd.DataFrame:
    options: dict[str, Any] = {
        "sep": separator,
        "dtype": str,
        "keep_default_na": False,
        "encoding": "utf-8-sig",
        "index_col": False,
        "skip_blank_lines": False,
        "skipinitialspace": True,
        "skiprows": skip_lines,
        "chunksize": _CHUNK_ROWS,
    }
    if names is not None:
        options |= {"header": None, "names": list(names)}
    first_row = skip_lines + (1 if names is not None else 2)
    chunks = []
    try:
        with warnings.catch_warnings():
            # The only sign that rows are longer than the header: they would be cut.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            with pd.read_csv(path, **options) as reader:
                chunks = [_tidy(chunk, wanted) for chunk in reader]
    except (pd.errors.ParserError, pd.errors.EmptyDataError, pd.errors.ParserWarning) as error:
        reason = str(error).replace("Error tokenizing data. C error: ", "").strip().split("\n")[0]
        if isinstance(error, pd.errors.ParserWarning):
            reason = "a row has more fields than the header"
        raise InvDiffError(
            f"{path} is not a readable table: {reason}; a cell that holds the separator must stand "
            'in double quotes, "a, b".'
        ) from None
    table = pd.concat(chunks)
    table.index += first_row
    return table


def _tidy(chunk: pd.DataFrame, wanted: list[str]) -> pd.DataFrame:
    """The wanted columns, stripped, without the rows of blank lines."""
    if chunk.shape[1] == 0:  # a header of nothing but blanks
        return chunk
    chunk = chunk.rename(columns=lambda name: str(name).strip())
    present = [name for name in wanted if name in chunk.columns]
    first = chunk.iloc[:, 0].fillna("")
    if (first == "").any():  # a blank line is empty in every column, wanted or not
        chunk = chunk[~(chunk.fillna("").eq("").all(axis=1))]
    return chunk[present].fillna("").apply(lambda column: column.str.strip())


def _read_json_lines(path: Path, wanted: list[str]) -> pd.DataFrame:
    cells: dict[str, list[str]] = {name: [] for name in wanted}
    rows: list[int] = []
    present: set[str] = set()
    with path.open(encoding="utf-8-sig") as stream:
        for row, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                entry = json.loads(line)
                values = [_json_text(entry.get(name)) for name in wanted]
            except (json.JSONDecodeError, AttributeError, TypeError) as error:
                raise InvDiffError(
                    f"{path}, line {row} is not a JSON object of plain values ({error})."
                ) from None
            rows.append(row)
            present.update(name for name in wanted if name in entry)
            for name, value in zip(wanted, values, strict=True):
                cells[name].append(value)
    chosen = {name: cells[name] for name in wanted if name in present or not rows}
    return pd.DataFrame(chosen, index=rows, dtype="str")


def _json_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        raise TypeError(f"{value!r} is no single value")
    return str(value).strip()


def _read_parquet(path: Path, wanted: list[str]) -> pd.DataFrame:
    try:
        import pyarrow as pa  # noqa: PLC0415 - only this format needs it
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise InvDiffError(
            f"{path} needs the package pyarrow: install it (pip install pyarrow), or save the "
            "table as CSV."
        ) from None
    try:
        present = [name for name in wanted if name in parquet.read_schema(path).names]
        table = parquet.read_table(path, columns=present)
        texts = {n: table[n].cast(pa.string()).fill_null("").to_pandas() for n in present}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InvDiffError(
            f"{path} is not a readable Parquet table of plain values: {error}."
        ) from None
    frame = pd.DataFrame(texts, dtype="str")
    frame.index += 1
    return frame.apply(lambda column: column.str.strip())


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1
