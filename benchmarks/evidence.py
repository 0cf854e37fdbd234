"""Measure the main figures of README and docs anew, going on where an earlier call was stopped.

These are the figures of the rows that ``--list`` prints, for seeds 0 to 2, and take many hours.

    python benchmarks/evidence.py [--output evidence] [--only waterbirds-0 celeba-1_4_4_1 …]
    python benchmarks/evidence.py --list

A row is one run folder or one audit in the output folder, with the command that makes it and skips
what is finished. Each word after ``--only`` is a row's name, or the beginning of several. After
each row ``tables.md`` and ``evidence.json`` are written for all finished rows, with the revision of
the code that made each row and a digest of its records.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invdiff_pl.report.blocks import Block, Heading, Table, Text, to_markdown
from invdiff_pl.report.compare import compare, read_report, table
from invdiff_pl.utils.files import digest_file, digest_json, read_json, write_json, write_text
from invdiff_pl.workflow.audit_result import JSON
from invdiff_pl.workflow.provenance import provenance
from invdiff_pl.workflow.records import RECORD

SEEDS = (0, 1, 2)
# The shipped backbones are trained on the first ratio of each data set; for the other ratios they
# are fine-tuned first.
RATIOS = {
    "celeba": {"1:4:4:1": None, "1:2:2:1": "1:2:2:1"},
    "fairface": {"3:2:1:1": None, "8:4:1:1": "8:4:1:1:1:1:4:8"},
}
FINE_TUNING = ("--scale.backbone_steps=800", "--scale.backbone_learning_rate=3e-4")
# The attribute that each data set's classifier reads, and the number of samples per prompt.
READS = {"waterbirds": ("background", 256), "celeba": ("gender", 512), "fairface": ("race", 512)}
TITLES = {
    "train": "Debiased with a data set",
    "audit": "Debiased from prompts alone, counted by the data run's classifier",
    "discovery": "What the inference finds",
}


@dataclass(frozen=True)
class Row:
    """A row of the evidence.

    Attributes:
        name: name of the row and of its folder.
        kind: ``train``, ``backbone``, ``audit`` or ``discovery``: what is read from its folder.
        command: words after the interpreter; the command goes on where it was stopped.
    """

    name: str
    kind: str
    command: tuple[str, ...]


def rows(output: Path) -> dict[str, Row]:
    """Return all rows by name, in the order in which they are run."""
    return {row.name: row for row in _rows(output)}


def _rows(output: Path) -> Iterator[Row]:
    for seed in SEEDS:
        yield _train(output, f"waterbirds-{seed}", "waterbirds", seed)
    for data, ratios in RATIOS.items():
        for name, ratio in ratios.items():
            start = f"{data}-{name.replace(':', '_')}"
            flags: list[str] = []
            if ratio is not None:
                flags = [f"--data.ratio={ratio}"]
                given = ("--backbone", f"asset:{data}", *flags, *FINE_TUNING)
                yield _train(output, f"{start}-backbone", data, 0, *given, command="backbone")
                trained = output / f"{start}-backbone" / "backbone" / "pipeline"
                flags += ["--backbone", str(trained)]
            for seed in SEEDS:
                yield _train(output, f"{start}-{seed}", data, seed, *flags)
    for data in READS:
        for seed in SEEDS:
            yield from _prompts(output, data, seed)
    grid = ["benchmarks/discovery.py", "--cache", str(output / "pools"), "--seeds"]
    grid += map(str, SEEDS)
    yield Row("discovery", "discovery", tuple(grid))
    yield Row("two-biases", "discovery", (*grid, "--two-biases", "0.95:0.8", "0.8:0.95"))


def _train(
    output: Path, name: str, experiment: str, seed: int, *flags: str, command: str = "train"
) -> Row:
    words = ["-m", "invdiff_pl", command, "--experiment", experiment]
    words += ["--run-dir", str(output / name), f"--seed_everything={seed}", *flags]
    return Row(name, command, tuple(words))


def _prompts(output: Path, data: str, seed: int) -> Iterator[Row]:
    """Yield a run without a data set, and its audit by the classifier of the run with one."""
    name = f"prompts-{data}-{seed}"
    given = ("--prompts", data, "--backbone", f"asset:{data}")
    yield _train(output, name, "prompts", seed, *given)
    (attribute, samples), ratio = READS[data], next(iter(RATIOS.get(data, {})), None)
    labelled = f"{data}-{seed}" if ratio is None else f"{data}-{ratio.replace(':', '_')}-{seed}"
    reader = output / labelled / "classifier" / "classifier"
    words = ["-m", "invdiff_pl", "audit", *given, "--lora", str(output / name)]
    words += ["--classifier", str(reader), attribute, "--seeds", str(seed)]
    words += ["--per-prompt", str(samples), "--guidance-scales", "1", "--steps", "20"]
    words += ["--batch-size", "128", "--output", str(output / f"{name}-audit")]
    yield Row(f"{name}-audit", "audit", tuple(words))


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
    if row.kind in ("audit", "discovery") and done.is_file():
        result = folder / (JSON if row.kind == "audit" else "rows.md")
        found = read_json(result)["figures"] if row.kind == "audit" else result.read_text("utf-8")
        digest = digest_file(result)[:12]
        return {**known, **read_json(done), "digest": digest, "figures": found}
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
        elif kind == "audit":
            cells = [cell for name in names for cell in _audited(name, found[name])]
            parts.append(Table(("row", "digest", "attribute", "when", "Bias"), cells))
        else:
            parts += [Text(found[name]["figures"].strip()) for name in names]
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


def _audited(name: str, row: dict[str, Any]) -> Iterator[list[str]]:
    for each in row["figures"]:
        bias = _figure(each["measures"]["bias"])
        yield [name, row["digest"], each["attribute"], each["when"], bias]


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
    print(f"{row.name}: {_line(row)}", flush=True)
    printed = subprocess.PIPE if row.kind == "discovery" else None
    ended = subprocess.run([sys.executable, *row.command], check=False, stdout=printed)
    if ended.returncode:
        raise SystemExit(f"{row.name}: exit status {ended.returncode}; mend it and run it again.")
    if ended.stdout is not None:
        write_text(output / row.name / "rows.md", ended.stdout.decode())
    if row.kind in ("audit", "discovery"):
        write_json(output / row.name / "done.json", {"revisions": [provenance()["revision"]]})


def _line(row: Row) -> str:
    return f"python {shlex.join(row.command)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run rows, and write the tables after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("evidence"), metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names, or beginnings of names")
    parser.add_argument("--list", action="store_true", help="tell rows and commands, run nothing")
    options = parser.parse_args(arguments)
    known = rows(options.output)
    for word in options.only or ():
        if not any(name.startswith(word) for name in known):
            parser.error(f"--only: no row begins with {word!r}: there are {', '.join(known)}.")
    chosen = [r for r in known.values() if r.name.startswith(tuple(options.only or ("",)))]
    for row in chosen:
        if options.list:
            print(row.name, _line(row), sep="\n  ")
        else:
            run(row, options.output)
            write(options.output)
    if not options.list:
        print((options.output / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
