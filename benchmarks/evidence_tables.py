"""Tables of the evidence, in Markdown."""

from collections.abc import Iterator
from typing import Any

from invdiff_pl.report.blocks import Block, Heading, Table, Text, to_markdown

TITLES = {
    "train": "Debiased with a data set",
    "peers": "Debiased from prompts alone",
    "ablation": "What each part is worth",
    "discovery": "What the inference finds",
}
# Methods of which every row of peers has figures; a row with more has a table of its own, too.
ALWAYS = {"nothing": "the backbone", "ours_prompts": "debiased"}
RUNS = (
    *("row", "digest", "Bias, training data", "before", "after", "prompt accuracy"),
    *("Fréchet distance", "precision", "recall", "environments: AUC / worst recall", "scale"),
    "verdict",
)
PROMPTS = ("row", "digest", "", "Bias", "prompt accuracy", "Fréchet distance", "precision")

Rows = dict[str, dict[str, Any]]


def tables(found: Rows, kinds: dict[str, str]) -> str:
    """Format all finished rows as Markdown, and list the others.

    Args:
        found: what is known of each finished row, by name.
        kinds: kind of each row, finished or not, by name.
    """
    revisions = sorted({each for row in found.values() for each in row["revisions"]})
    parts: list[Block] = [
        Heading("Evidence", 1),
        Text(f"Made by `make evidence` at revision {', '.join(revisions) or 'none'}."),
    ]
    missing = [name for name, kind in kinds.items() if kind in TITLES and name not in found]
    if missing:
        parts.append(Text(f"Rows that have not been run: {', '.join(missing)}."))
    for kind, title in TITLES.items():
        rows = {name: row for name, row in found.items() if kinds[name] == kind}
        blocks = [*_BLOCKS[kind](rows)] if rows else []
        parts += [Heading(title), *blocks] if blocks else []
    return to_markdown(parts)


def _runs(rows: Rows) -> Iterator[Block]:
    """Yield a table of the runs that are scored by labels."""
    scored = [name for name, row in rows.items() if row["report"]["bias"]["after"] is not None]
    if scored:
        yield Table(RUNS, [_run(name, rows[name]) for name in scored])


def _run(name: str, row: dict[str, Any]) -> list[str]:
    report = row["report"]
    bias, accuracy, distance = (report[n] for n in ("bias", "prompt_accuracy", "frechet_distance"))
    found, scale = report["environments"], (report["calibration"] or {}).get("scale")
    cells = [name, row["digest"], f"{bias['data']['mean']:.3f}"]
    cells += [_interval(bias["before"]), _interval(bias["after"])]
    cells.append(f"{100 * accuracy['before']:.1f} → {100 * accuracy['after']:.1f} %")
    cells.append(f"{distance['before']:.1f} → {distance['after']:.1f}")
    cells += [_change(report[measure], 3) for measure in ("precision", "recall")]
    measured = [(found["auc"], 3), (found["worst_group_recall"], 2)]
    cells.append(" / ".join("–" if each is None else f"{each:.{n}f}" for each, n in measured))
    return [*cells, "–" if scale is None else f"{scale:.2f}", found["verdict"]]


def _peers(rows: Rows) -> Iterator[Block]:
    """Yield a table of the backbones and of what is made of them, and the larger tables."""
    yield Table(PROMPTS, [cells for name, row in rows.items() for cells in _methods(name, row)])
    for name, row in rows.items():
        if row["methods"].keys() - ALWAYS.keys():
            yield from _text({name: row})


def _methods(name: str, row: dict[str, Any]) -> Iterator[list[str]]:
    for method, what in ALWAYS.items():
        found = row["methods"][method]
        accuracy, precision = found["prompt_accuracy"]["mean"], found["manifold"]["precision"]
        cells = [name, row["digest"], what, _interval(found["bias"]), f"{100 * accuracy:.1f} %"]
        yield [*cells, f"{found['frechet_distance']:.1f}", f"{precision:.3f}"]


def _text(rows: Rows) -> Iterator[Block]:
    """Yield each row's own table."""
    for name, row in rows.items():
        yield Heading(name, 3)
        yield Text(f"Digest {row['digest']}.")
        yield Text(row["figures"].strip())


def _interval(bias: dict[str, Any]) -> str:
    low, high = bias["interval"]
    return f"{bias['mean']:.3f} [{low:.3f}, {high:.3f}]"


def _change(figure: dict[str, Any], digits: int) -> str:
    before, after = (figure[when] for when in ("before", "after"))
    return "–" if after is None else f"{before:.{digits}f} → {after:.{digits}f}"


_BLOCKS = {"train": _runs, "peers": _peers, "ablation": _text, "discovery": _text}
