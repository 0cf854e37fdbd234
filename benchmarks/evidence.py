"""Measure the main figures of README and docs anew, going on where an earlier call was stopped.

These are the figures of the rows that ``--list`` prints, and take many hours.

    python benchmarks/evidence.py [--output evidence] [--only waterbirds-0 celeba-1_4_4_1 …]
    python benchmarks/evidence.py --list
    python benchmarks/evidence.py --tables

A row is one folder in the output folder, with the command that makes it and skips what is finished.
Each word after ``--only`` is a row's name, or the beginning of several. After each row
``tables.md`` and ``evidence.json`` are written for all finished rows, with the revision of the code
that made each row and a digest of its records.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence_rows import Row, chosen, rows
from evidence_tables import tables

from invdiff_pl.report.compare import read_report
from invdiff_pl.utils.files import digest_file, digest_json, read_json, write_json, write_text
from invdiff_pl.workflow.provenance import provenance
from invdiff_pl.workflow.records import RECORD

# The table that a row's command writes, or prints.
MARKDOWN = {"peers": "peers.md", "ablation": "ablation.md", "discovery": "rows.md"}


def facts(row: Row, folder: Path) -> dict[str, Any] | None:
    """Return revisions, digest and figures of a finished row; ``None`` if it is not finished."""
    stages = {file.parent.name: read_json(file) for file in sorted(folder.glob(f"*/{RECORD}"))}
    known = {
        "command": row.command,
        "revisions": sorted({str(record["revision"]) for record in stages.values()}),
        "digest": digest_json({name: record["digest"] for name, record in stages.items()})[:12],
    }
    done = folder / "done.json"
    if row.kind == "train" and (folder / "report" / "report.json").is_file():
        return {**known, "report": read_report(folder)}
    if row.kind == "backbone" and "card" in stages:
        return known
    if row.kind in MARKDOWN and done.is_file():
        result = folder / MARKDOWN[row.kind]
        lines = result.read_text(encoding="utf-8").splitlines()
        if row.kind == "discovery":  # progress is printed between the rows of its table
            lines = [line for line in lines if line.startswith("|")]
        told = {"digest": digest_file(result)[:12], "figures": "\n".join(lines)}
        if row.kind == "peers":
            told["methods"] = read_json(result.with_suffix(".json"))
        return {**known, **read_json(done), **told}
    return None


def write(output: Path) -> None:
    """Write ``tables.md`` and ``evidence.json`` for all finished rows."""
    told = {name: facts(row, output / name) for name, row in rows(output).items()}
    found = {name: each for name, each in told.items() if each is not None}
    kinds = {name: row.kind for name, row in rows(output).items()}
    write_json(output / "evidence.json", found)
    write_text(output / "tables.md", tables(found, kinds))


def run(row: Row, output: Path) -> None:
    """Run a row's command; for rows without stages the revision is kept beside the result.

    Raises:
        SystemExit: if it fails.
    """
    folder = output / row.name
    if row.kind == "pictures" and (folder / "metadata.csv").is_file():
        return  # their scripts refuse a folder that is there
    print(f"{row.name}: {_line(row)}", flush=True)
    printed = subprocess.PIPE if row.kind == "discovery" else None
    ended = subprocess.run([sys.executable, *row.command], check=False, stdout=printed)
    if ended.returncode:
        raise SystemExit(f"{row.name}: exit status {ended.returncode}; mend it and run it again.")
    if ended.stdout is not None:
        write_text(folder / MARKDOWN[row.kind], ended.stdout.decode())
    if row.kind in MARKDOWN:
        write_json(folder / "done.json", {"revisions": [provenance()["revision"]]})


def _line(row: Row) -> str:
    return f"python {shlex.join(row.command)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run rows, and write the tables after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("evidence"), metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names, or beginnings of names")
    parser.add_argument("--list", action="store_true", help="tell rows and commands, run nothing")
    parser.add_argument(
        "--tables", action="store_true", help="only write the tables of what is there anew"
    )
    options = parser.parse_args(arguments)
    try:
        found = chosen(rows(options.output), options.only or ("",))
    except ValueError as error:
        parser.error(f"--only: {error}")
    if options.list:
        for row in found:
            print(row.name, _line(row), sep="\n  ")
        return
    for row in () if options.tables else found:
        run(row, options.output)
        write(options.output)
    if options.tables:
        write(options.output)
    print((options.output / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
