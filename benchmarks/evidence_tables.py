"""Tables of the evidence, in Markdown."""

from collections.abc import Callable, Iterator
from typing import Any

from invdiff_pl.report.blocks import Block, Heading, Table, Text, to_markdown
from invdiff_pl.report.figures import estimate_text

# Methods of which every row of peers has figures; a row with more has a table of its own, too.
ALWAYS = {"nothing": "the backbone", "ours_prompts": "debiased"}
RUN_COLUMNS = (
    *("row", "digest", "Bias, training data", "before", "after", "prompt accuracy"),
    *("Fréchet distance", "precision", "recall", "environments: AUC / worst recall", "scale"),
    "verdict",
)
PEER_COLUMNS = (
    *("row", "digest", "model", "Bias", "prompt accuracy", "Fréchet distance"),
    *("precision", "recall"),
)
NOTE = """\
Each row is a folder of `make evidence`, see [usage](usage.md#evidence), and its digest is that of
the folder's records. Bias is given with its 95 % interval; the scale is the calibrated one. Of the
inference, `auc`, `recall` (in the prompt where it is lowest), `values`, `evidence`, `alignment` and
`p_value` are those of the first candidate; `rank` is the place of the candidate that matches the
attribute best; alarms are biases reported in random halves of a set without one."""

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
        Text(" ".join(NOTE.split())),
    ]
    missing = [name for name, kind in kinds.items() if kind in SECTIONS and name not in found]
    missing = [name for name in missing if f"{name}-peers" not in kinds]  # scored there
    if missing:
        parts.append(Text(f"Rows that have not been run: {', '.join(missing)}."))
    for kind, (title, blocks_of) in SECTIONS.items():
        rows = {name: row for name, row in found.items() if kinds[name] == kind}
        blocks = [*blocks_of(rows)] if rows else []
        parts += [Heading(title), *blocks] if blocks else []
    return to_markdown(parts)


def _runs(rows: Rows) -> Iterator[Block]:
    """Yield a table of the runs that are scored by labels."""
    scored = [name for name, row in rows.items() if row["report"]["bias"]["after"] is not None]
    if scored:
        yield Table(RUN_COLUMNS, [_run(name, rows[name]) for name in scored])


def _run(name: str, row: dict[str, Any]) -> list[str]:
    report = row["report"]
    bias, accuracy, distance = (report[n] for n in ("bias", "prompt_accuracy", "frechet_distance"))
    found, scale = report["environments"], (report["calibration"] or {}).get("scale")
    cells = [name, row["digest"], f"{bias['data']['mean']:.3f}"]
    cells += [estimate_text(bias["before"]), estimate_text(bias["after"])]
    cells.append(f"{100 * accuracy['before']:.1f} → {100 * accuracy['after']:.1f} %")
    cells.append(f"{distance['before']:.1f} → {distance['after']:.1f}")
    cells += [_change(report[measure], 3) for measure in ("precision", "recall")]
    measured = [(found["auc"], 3), (found["worst_group_recall"], 2)]
    cells.append(" / ".join("–" if each is None else f"{each:.{n}f}" for each, n in measured))
    return [*cells, "–" if scale is None else f"{scale:.2f}", found["verdict"]]


def _peers(rows: Rows) -> Iterator[Block]:
    """Yield a table of the backbones and of what is made of them, and the larger tables."""
    yield Table(
        PEER_COLUMNS, [cells for name, row in rows.items() for cells in _methods(name, row)]
    )
    for name, row in rows.items():
        if row["methods"].keys() - ALWAYS.keys():
            yield from _text({name: row})


def _methods(name: str, row: dict[str, Any]) -> Iterator[list[str]]:
    for method, what in ALWAYS.items():
        cells, found = [name, row["digest"], what], row["methods"][method]
        if "reason" in found:  # it could not be run
            yield [*cells, *["–"] * (len(PEER_COLUMNS) - len(cells))]
            continue
        distance, manifold = found["frechet_distance"], found["manifold"]
        cells += [estimate_text(found["bias"]), f"{100 * found['prompt_accuracy']['mean']:.1f} %"]
        cells.append("–" if distance is None else f"{distance:.1f}")
        yield [*cells, *(f"{manifold[measure]:.3f}" for measure in ("precision", "recall"))]


def _text(rows: Rows) -> Iterator[Block]:
    """Yield each row's own table."""
    for name, row in rows.items():
        yield Heading(name, 3)
        yield Text(f"Digest {row['digest']}.")
        yield Text(row["figures"].strip())


def _change(figure: dict[str, Any], digits: int) -> str:
    before, after = (figure[when] for when in ("before", "after"))
    return "–" if after is None else f"{before:.{digits}f} → {after:.{digits}f}"


SECTIONS: dict[str, tuple[str, Callable[[Rows], Iterator[Block]]]] = {
    "train": ("Debiased with a data set", _runs),
    "peers": ("Debiased from prompts alone", _peers),
    "ablation": ("What each part is worth", _text),
    "discovery": ("What the inference finds", _text),
}
