"""Measure the main figures of README and docs anew, going on where an earlier call was stopped.

These are the figures of the rows that ``--list`` prints, and take many hours.

    python benchmarks/evidence.py [--output evidence] [--only waterbirds-0 celeba-1_4_4_1 …]
    python benchmarks/evidence.py --list
    python benchmarks/evidence.py --tables

A row is one folder in the output folder, with the command that makes it. What is on disk is not
computed anew, but for photographs and two biases. A row that reads another's folder needs that one
first, and of the rows that discovery.py makes, which share a folder, run one at a time.
Each word after ``--only`` is a row's name, or the beginning of several. After each row
``tables.md`` and ``evidence.json`` are written for all finished rows, with the revision of the code
that made each row and a digest of its records.
"""

import argparse
import os
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
        told = {"digest": digest_file(result)[:12], "figures": result.read_text(encoding="utf-8")}
        if row.kind == "peers":
            told["methods"] = read_json(result.with_suffix(".json"))
        return {**known, **read_json(done), **told}
    return None


def write(output: Path) -> None:
    """Write ``tables.md`` and ``evidence.json`` for all finished rows."""
    known = rows(output)
    told = {name: facts(row, output / name) for name, row in known.items()}
    found = {name: each for name, each in told.items() if each is not None}
    kinds = {name: row.kind for name, row in known.items()}
    write_json(output / "evidence.json", found)
    write_text(output / "tables.md", tables(found, kinds))


def run(row: Row, output: Path) -> None:
    """Run a row's command, on one thread unless ``OMP_NUM_THREADS`` says otherwise.

    For rows without stages the revision is kept beside the result: those of all calls that changed
    it, since a command does not compute anew what is on disk.

    Raises:
        SystemExit: if it fails.
    """
    folder = output / row.name
    if row.kind == "pictures" and (folder / "metadata.csv").is_file():
        return  # their scripts refuse a folder that is there
    print(f"{row.name}: {_line(row)}", flush=True)
    result = folder / MARKDOWN.get(row.kind, "")
    before = digest_file(result) if result.is_file() else None
    printed = subprocess.PIPE if row.kind == "discovery" else None
    threads = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, *row.command]
    ended = subprocess.run(command, check=False, stdout=printed, env=threads)
    if ended.returncode:
        raise SystemExit(f"{row.name}: exit status {ended.returncode}; mend it and run it again.")
    if ended.stdout is not None:  # progress is printed between the rows of the table
        lines = [each for each in ended.stdout.decode().splitlines() if each.startswith("|")]
        write_text(result, "\n".join(lines) + "\n")
    done = folder / "done.json"
    earlier = read_json(done)["revisions"] if done.is_file() else []
    if row.kind in MARKDOWN and (not earlier or digest_file(result) != before):
        write_json(done, {"revisions": sorted({*earlier, str(provenance()["revision"])})})


def _line(row: Row) -> str:
    return f"python {shlex.join(row.command)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run rows, and write the tables after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("evidence"), metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names, or beginnings of names")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="tell rows and commands, run nothing")
    instead.add_argument(
        "--tables", action="store_true", help="write the tables of what is there, run nothing"
    )
    options = parser.parse_args(arguments)
    if options.tables and options.only:
        parser.error("--tables: the tables hold all rows that are there; leave out --only.")
    try:
        found = chosen(rows(options.output), options.only or ("",))
    except ValueError as error:
        parser.error(f"--only: {error}")
    if options.list:
        for row in found:
            print(row.name, _line(row), sep="\n  ")
        return
    if options.tables:
        write(options.output)
    else:
        for row in found:
            run(row, options.output)
            write(options.output)
    print((options.output / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
