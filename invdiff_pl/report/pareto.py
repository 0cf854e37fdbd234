"""A sweep's table and plot: what less bias costs."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

from invdiff_pl.report.figures import interval_text
from invdiff_pl.report.plots import save_figure
from invdiff_pl.utils.labels import plain

mpl.use("Agg")
from matplotlib import pyplot as plt

# Figures that less bias is traded for.
COSTS = {
    "frechet_distance": "Fréchet distance",
    "prompt_accuracy": "prompt accuracy",
    "recall": "recall",
}


def mark_pareto(points: list[dict[str, Any]]) -> None:
    """Set ``pareto`` in each point: whether no other point of its run dominates it.

    Another point dominates it if it is at least as good in both Bias and Fréchet distance and
    better in one. A point without a distance is not on the curve.
    """
    for point in points:
        own = point["bias"], point["frechet_distance"]
        others = [
            (other["bias"], other["frechet_distance"])
            for other in points
            if other["run"] == point["run"] and other["frechet_distance"] is not None
        ]
        point["pareto"] = own[1] is not None and not any(
            bias <= own[0] and distance <= own[1] and (bias, distance) != own
            for bias, distance in others
        )


def sweep_markdown(points: list[dict[str, Any]]) -> str:
    """Format a table, one row per point; ``*`` marks the Pareto curve of Bias and distance."""
    header = (
        "run",
        "guidance scale",
        "invariant scale",
        "Bias",
        "Fréchet distance",
        "prompt accuracy",
        "precision",
        "recall",
        "Pareto",
    )
    rows = [header, ("---",) * len(header)]
    for point in points:
        rows.append(
            (
                point["run"].replace("|", "\\|"),
                f"{point['guidance_scale']:g}",
                f"{point['invariant_scale']:g}",
                f"{point['bias']:.3f} {interval_text(point['bias_interval'])}",
                _number(point["frechet_distance"], 2),
                f"{100 * point['prompt_accuracy']:.1f} %",
                _number(point["precision"], 3),
                _number(point["recall"], 3),
                "*" if point["pareto"] else "",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def plot_sweep(points: list[dict[str, Any]], path: Path) -> None:
    """Plot each cost against Bias, with a line over invariant scales per run and guidance scale."""
    figure, panels = plt.subplots(1, len(COSTS), figsize=(4.2 * len(COSTS), 4))
    curves: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for point in points:
        curves.setdefault((point["run"], point["guidance_scale"]), []).append(point)
    names = {run for run, _ in curves}
    for axes, (key, name) in zip(panels, COSTS.items(), strict=True):
        for (run, guidance), curve in curves.items():
            shown = [point for point in curve if point[key] is not None]
            label = f"guidance {guidance:g}" + (f", {plain(run)}" if len(names) > 1 else "")
            values = [(point["bias"], point[key]) for point in shown]
            axes.plot(
                *([list(v) for v in zip(*values, strict=True)] or [[], []]), "o-", ms=4, label=label
            )
            for point, (x, y) in zip(shown, values, strict=True):
                text = f"{point['invariant_scale']:g}"
                axes.annotate(text, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set_xlabel("Bias (lower is better)")
        axes.set_ylabel(name)
    panels[0].legend(frameon=False, fontsize=7)
    figure.suptitle("labels: invariant scale (0 is the backbone)", fontsize=9)
    save_figure(figure, path)
