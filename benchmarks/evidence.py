"""Measure the main figures of README and docs anew, going on where an earlier call was stopped.

These are the figures of the rows that ``--list`` prints, and take many hours.

    python benchmarks/evidence.py [--output evidence] [--only waterbirds-0 celeba-1_4_4_1 …]
    python benchmarks/evidence.py --list

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

from invdiff_pl.report.blocks import Block, Heading, Table, Text, to_markdown
from invdiff_pl.report.compare import compare, read_report, table
from invdiff_pl.utils.files import digest_file, digest_json, read_json, write_json, write_text
from invdiff_pl.workflow.provenance import provenance
from invdiff_pl.workflow.records import RECORD

TITLES = {
    "train": "Debiased, with a data set and without",
    "peers": "Debiased from prompts alone, beside other methods",
    "ablation": "What each part is worth",
    "discovery": "What the inference finds",
}
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
        return {**known, **read_json(done), **told}
    return None


def tables(found: dict[str, dict[str, Any]], kinds: dict[str, str]) -> str:
    """Format all finished rows as Markdown."""
    revisions = sorted({each for row in found.values() for each in row["revisions"]})
    parts: list[Block] = [
        Heading("Evidence", 1),
        Text(f"Made by `make evidence` at revision {', '.join(revisions) or 'none'}."),
    ]
    for kind, title in TITLES.items():
        names = [name for name in found if kinds[name] == kind]
        if not names:
            continue
        parts.append(Heading(title))
        if kind == "train":
            reports = [found[name]["report"] for name in names]
            parts.append(Table(SUMMARY, [_summary(name, found[name]) for name in names]))
            parts.append(table(names, compare(reports)))
            continue
        for name in names:
            parts += [Heading(name, 3), Text(f"Digest {found[name]['digest']}.")]
            parts.append(Text(found[name]["figures"].strip()))
    return to_markdown(parts)


SUMMARY = (
    *("row", "digest", "Bias, training data", "before", "after", "prompt accuracy"),
    *("Fréchet distance", "environments: AUC / worst recall", "scale", "verdict"),
)


def _summary(name: str, row: dict[str, Any]) -> list[str]:
    """Return a row in README's form."""
    report = row["report"]
    bias, accuracy, distance = (report[n] for n in ("bias", "prompt_accuracy", "frechet_distance"))
    found, scale = report["environments"], (report["calibration"] or {}).get("scale")
    cells = [name, row["digest"]]
    if bias["after"] is None:  # no labels
        cells += ["–"] * 5
    else:
        cells += [f"{bias['data']['mean']:.3f}", *map(_figure, (bias["before"], bias["after"]))]
        cells.append(f"{100 * accuracy['before']:.1f} → {100 * accuracy['after']:.1f} %")
        cells.append(f"{distance['before']:.1f} → {distance['after']:.1f}")
    measured = [(found["auc"], 3), (found["worst_group_recall"], 2)]
    cells.append(" / ".join("–" if each is None else f"{each:.{n}f}" for each, n in measured))
    return [*cells, "–" if scale is None else f"{scale:.2f}", found["verdict"]]


def _figure(bias: dict[str, Any]) -> str:
    low, high = bias["interval"]
    return f"{bias['mean']:.3f} [{low:.3f}, {high:.3f}]"


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
    options = parser.parse_args(arguments)
    try:
        found = chosen(rows(options.output), options.only or ("",))
    except ValueError as error:
        parser.error(f"--only: {error}")
    for row in found:
        if options.list:
            print(row.name, _line(row), sep="\n  ")
        else:
            run(row, options.output)
            write(options.output)
    if not options.list:
        print((options.output / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
