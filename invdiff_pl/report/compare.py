"""``compare``: the figures of several runs in one table; Markdown, LaTeX and CSV."""

import argparse
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invdiff_pl.report.blocks import Strong, Table, to_markdown
from invdiff_pl.report.figures import TITLES
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file, read_json, write_text

Interval = tuple[float, float]
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$", "×": r"$\times$", "é": r"\'e",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One figure of one run.

    Attributes:
        value: the figure, not rounded.
        interval: its 95 % interval, if there is one.
        best: whether it is the best of its column, with an interval apart from all others.
    """

    value: float
    interval: Interval | None = None
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One figure of all runs.

    Attributes:
        name: name that tells it from all figures it must not be compared with.
        lower_is_better: whether lower figures are better rather than higher ones; ``None`` if
            neither are, in which case no figure is marked.
        digits: number of digits after the point.
        figures: one figure per run; ``None`` where a run has none.
    """

    name: str
    lower_is_better: bool | None
    digits: int
    figures: list[Figure | None]


def run_compare(arguments: Sequence[str]) -> None:
    """Print the comparison, and write it to files if asked.

    Raises:
        InvDiffError: if a run has no report.
    """
    parser = argparse.ArgumentParser(
        prog="python -m invdiff_pl compare", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="also write the table as LaTeX")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the figures as CSV")
    options = parser.parse_args(arguments)
    reports = [read_report(folder) for folder in options.runs]
    names = run_names(options.runs)
    columns = compare(reports)
    print(to_markdown([table(names, columns)]))
    print("bold: the best of its column, if its 95 % interval overlaps no other")
    if options.latex is not None:
        write_text(options.latex, latex(names, columns))
    if options.csv is not None:
        write_text(options.csv, as_csv(names, columns))


def read_report(folder: Path) -> dict[str, Any]:
    """Read the ``report.json`` of a run folder.

    Raises:
        InvDiffError: if there is none.
    """
    file = folder / "report" / "report.json"
    if not is_file(file):
        raise InvDiffError(
            f"{folder} has no report/report.json: give the folder of a finished run, such "
            "as runs/waterbirds/mini, or write its report with `python -m invdiff_pl report "
            f"--run-dir {folder}`."
        )
    report: dict[str, Any] = read_json(file)
    return report


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names without the leading part that all have in common."""
    parts = [folder.resolve().parts for folder in folders]
    shared = 0
    shortest = min(map(len, parts)) - 1
    while shared < shortest and len({part[shared] for part in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def compare(reports: Sequence[dict[str, Any]]) -> list[Column]:
    """Return the columns, with the best figures marked, without those that no run has."""
    found = [_figures(report) for report in reports]
    kinds: dict[str, tuple[bool | None, int]] = {}
    for figures in found:
        for name, (lower, digits, _) in figures.items():
            kinds.setdefault(name, (lower, digits))
    return [
        Column(
            name, lower, digits, _mark(lower, [f[name][2] if name in f else None for f in found])
        )
        for name, (lower, digits) in kinds.items()
    ]


def _figures(report: dict[str, Any]) -> dict[str, tuple[bool | None, int, Figure]]:
    """Return a run's figures by name: whether lower is better, number of digits, figure."""
    found: dict[str, tuple[bool | None, int, Figure]] = {}
    bias = report["bias"]
    if bias["after"] is not None:
        kind = f"Bias ({bias['attribute']})" if bias.get("attribute") else "Bias"
        for when, lower in (("before", None), ("after", True)):
            figure = Figure(bias[when]["mean"], _pair(bias[when]["interval"]))
            found[f"{kind} {when}"] = (lower, 3, figure)
    accuracy = report["prompt_accuracy"]
    if accuracy["after"] is not None:
        ends = [100 * end for end in accuracy["interval_after"]]
        found["prompt accuracy, %"] = (False, 1, Figure(100 * accuracy["after"], _pair(ends)))
    distances = {"frechet_distance": report["frechet_distance"], **report.get("distances", {})}
    for name, distance in distances.items():
        if distance["after"] is not None:
            title = f"{TITLES.get(name, 'Fréchet distance')} ({_conditions(distance)})"
            found[title] = (True, 2, Figure(distance["after"]))
    for name in ("precision", "recall"):
        if report[name]["after"] is not None:
            title = f"{name} (k = {report[name]['neighbours']}, {report[name]['extractor']})"
            found[title] = (False, 3, Figure(report[name]["after"]))
    if report["clip_t"]["after"] is not None:
        found["CLIP-T"] = (False, 2, Figure(report["clip_t"]["after"]))
    if (augmentation := report.get("augmentation")) is not None:
        group = augmentation["augmented"]
        ends = [100 * end for end in group["worst_group_interval"]]
        figure = Figure(100 * group["worst_group"], _pair(ends))
        found["worst-group accuracy, augmented, %"] = (False, 1, figure)
    if report["environments"]["auc"] is not None:
        found["environment AUC"] = (False, 4, Figure(report["environments"]["auc"]))
    found["seconds"] = (True, 0, Figure(report["seconds"]["total"]))
    return found


def _conditions(distance: dict[str, Any]) -> str:
    """Describe what makes distances comparable: extractor, resize, sizes of both sets."""
    extractor, resize = distance.get("extractor"), distance.get("resize")
    return f"{extractor} at {resize}, {distance['n']} against {distance['reference_images']}"


def _mark(lower_is_better: bool | None, figures: list[Figure | None]) -> list[Figure | None]:
    """Mark the best figure, if its interval is apart from every other one."""
    present = [figure for figure in figures if figure is not None]
    known = [figure for figure in present if figure.interval is not None]
    if lower_is_better is None or len(known) < max(2, len(present)):
        return figures
    sign = 1 if lower_is_better else -1
    best = min(known, key=lambda figure: sign * figure.value)
    others = [figure for figure in known if figure is not best]
    if not all(_apart(best, other, lower_is_better) for other in others):
        return figures
    return [Figure(f.value, f.interval, best=True) if f is best else f for f in figures]


def _apart(best: Figure, other: Figure, lower_is_better: bool) -> bool:
    assert best.interval is not None
    assert other.interval is not None
    if lower_is_better:
        return best.interval[1] < other.interval[0]
    return best.interval[0] > other.interval[1]


def table(names: Sequence[str], columns: Sequence[Column]) -> Table:
    """Return a table with one row per run."""
    rows = [[name, *(_cell(column, row) for column in columns)] for row, name in enumerate(names)]
    return Table(["run", *(column.name for column in columns)], rows)


def _cell(column: Column, row: int) -> str:
    figure = column.figures[row]
    if figure is None:
        return "–"
    text = f"{figure.value:.{column.digits}f}"
    if figure.interval is not None:
        low, high = (f"{end:.{column.digits}f}" for end in figure.interval)
        text += f" [{low}, {high}]"
    return Strong(text) if figure.best else text


def latex(names: Sequence[str], columns: Sequence[Column]) -> str:
    """Return a ``tabular`` with the rules of the booktabs package."""
    content = table(names, columns)
    lines = [
        r"\begin{tabular}{l" + "r" * len(columns) + "}",
        r"\toprule",
        " & ".join(map(_latex, content.header)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_latex, row)) + r" \\" for row in content.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex(cell: str) -> str:
    text = "".join(_LATEX.get(letter, letter) for letter in cell).replace("–", "--")
    # A bracket after a line break would be read as its optional argument.
    text = f"{{}}{text}" if text.startswith("[") else text
    return rf"\textbf{{{text}}}" if isinstance(cell, Strong) else text


def as_csv(names: Sequence[str], columns: Sequence[Column]) -> str:
    """Return CSV at full precision, with the ends of intervals in their own columns."""
    header = ["run"]
    for column in columns:
        header += [column.name, f"{column.name} low", f"{column.name} high"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for row, name in enumerate(names):
        cells: list[Any] = [name]
        for column in columns:
            figure = column.figures[row]
            ends = (None, None) if figure is None or figure.interval is None else figure.interval
            cells += [None if figure is None else figure.value, *ends]
        writer.writerow(cells)
    return stream.getvalue()


def _pair(ends: Sequence[float]) -> Interval:
    low, high = ends
    return (low, high)
