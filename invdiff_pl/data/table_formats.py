"""Formats of tables: CSV and the like, JSON lines, JSON arrays and Parquet, as text columns."""

import csv
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from invdiff_pl.utils.errors import InvDiffError

SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json")
_SEPARATORS = ",;\t|"
# Wide tables are reduced to the wanted columns chunk by chunk, which bounds memory.
_CHUNK_ROWS = 100_000
_NO_PARQUET = "{path} is not a readable Parquet table of plain values: {error}."


def separator_of(path: Path) -> str:
    """Find the separator of a table's header line: a comma, semicolon, tab or bar.

    Args:
        path: path of a CSV table, or one like it.
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig") as stream:
        header = stream.readline()
    try:
        return csv.Sniffer().sniff(header, delimiters=_SEPARATORS).delimiter
    except csv.Error:  # a single column
        return ","


def column_names(path: Path) -> list[str]:
    """Return the columns of a table; for JSON, those of its first entry.

    Raises:
        InvDiffError: if the table cannot be read.
        OSError: if the file cannot be opened.
        UnicodeDecodeError: if the file is not UTF-8 text.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_columns(path)
    if suffix in (".jsonl", ".json"):
        entries = _lines(path) if suffix == ".jsonl" else _entries(path)
        _, first = next(iter(entries), (1, {}))
        return list(first) if isinstance(first, dict) else []
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream, delimiter=separator_of(path), skipinitialspace=True)
        return [name.strip() for name in next(rows, [])]


def read_csv(
    path: Path, wanted: list[str], separator: str, names: Sequence[str] | None, skip_lines: int
) -> pd.DataFrame:
    """Read the wanted columns of a CSV table, stripped, without blank lines."""
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
            # This is the only sign that rows are longer than the header, and would be cut.
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
    """Keep the wanted columns, stripped, without the rows of blank lines."""
    if chunk.shape[1] == 0:  # a header of nothing but blanks
        return chunk
    chunk = chunk.rename(columns=lambda name: str(name).strip())
    present = [name for name in wanted if name in chunk.columns]
    first = chunk.iloc[:, 0].fillna("")
    if (first == "").any():  # a blank line is empty in every column, wanted or not
        chunk = chunk[~(chunk.fillna("").eq("").all(axis=1))]
    return chunk[present].fillna("").apply(lambda column: column.str.strip())


def read_json(path: Path, wanted: list[str]) -> pd.DataFrame:
    """Read the wanted columns of JSON lines (``.jsonl``) or an array of objects (``.json``)."""
    lines = path.suffix.lower() == ".jsonl"
    cells: dict[str, list[str]] = {name: [] for name in wanted}
    rows: list[int] = []
    present: set[str] = set()
    for row, entry in _lines(path) if lines else _entries(path):
        try:
            values = [_json_text(entry.get(name)) for name in wanted]
        except (AttributeError, TypeError) as error:
            raise InvDiffError(
                f"{path}, {'line' if lines else 'entry'} {row} is not a JSON object of plain "
                f"values ({error})."
            ) from None
        rows.append(row)
        present.update(name for name in wanted if name in entry)
        for name, value in zip(wanted, values, strict=True):
            cells[name].append(value)
    chosen = {name: cells[name] for name in wanted if name in present or not rows}
    return pd.DataFrame(chosen, index=rows, dtype="str")


def _lines(path: Path) -> Iterable[tuple[int, Any]]:
    """Yield the number and the content of each line of a file of JSON lines."""
    with path.open(encoding="utf-8-sig") as stream:
        for row, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                yield row, json.loads(line)
            except json.JSONDecodeError as error:
                raise InvDiffError(
                    f"{path}, line {row} is not a JSON object of plain values ({error})."
                ) from None


def _entries(path: Path) -> Iterable[tuple[int, Any]]:
    """Return the numbers and the entries of a JSON array."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InvDiffError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(content, list):
        raise InvDiffError(
            f"{path} holds no JSON array: expected one object per image, "
            '[{"file_name": "1.png", "text": "a dog"}, …], or JSON lines in a .jsonl file.'
        )
    return enumerate(content, start=1)


def _json_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        raise TypeError(f"{value!r} is not a single value")
    return str(value).strip()


def read_parquet(path: Path, wanted: list[str]) -> pd.DataFrame:
    """Read the wanted columns of a Parquet file."""
    present = [name for name in wanted if name in _parquet_columns(path)]
    import pyarrow as pa  # noqa: PLC0415 - only this format needs it
    from pyarrow import parquet  # noqa: PLC0415

    try:
        table = parquet.read_table(path, columns=present)
        texts = {n: table[n].cast(pa.string()).fill_null("").to_pandas() for n in present}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InvDiffError(_NO_PARQUET.format(path=path, error=error)) from None
    frame = pd.DataFrame(texts, dtype="str")
    frame.index += 1
    return frame.apply(lambda column: column.str.strip())


def _parquet_columns(path: Path) -> list[str]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - only this format needs it
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise InvDiffError(
            f"{path} needs the package pyarrow: install it (pip install pyarrow), or save the "
            "table as CSV."
        ) from None
    try:
        return [str(name) for name in parquet.read_schema(path).names]
    except pa.ArrowInvalid as error:
        raise InvDiffError(_NO_PARQUET.format(path=path, error=error)) from None
