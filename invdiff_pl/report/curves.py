"""Plots of the course of training, from event files, and of Bias against quality."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invdiff_pl.report.plots import plt, save_figure
from invdiff_pl.utils.labels import plain

Series = dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]
_SMOOTHING = 0.9


def read_scalars(folder: Path) -> Series:
    """Read the steps and values of every scalar in a folder of event files, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,  # takes a second
    )

    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: (
            np.array([event.step for event in events.Scalars(tag)]),
            np.array([event.value for event in events.Scalars(tag)], dtype=np.float64),
        )
        for tag in events.Tags()["scalars"]
    }


def plot_curves(folder: Path, attribute: str, path: Path) -> bool:
    """Plot risks, Bias and Fréchet distance over the steps of training.

    Returns:
        whether there was anything to draw.
    """
    scalars = read_scalars(folder)
    parts = sorted(tag for tag in scalars if tag.startswith("train/risk/"))
    bias = f"bias/{attribute}"
    wanted = {
        "denoising risk (smoothed)": ["train/mean_risk", "train/loss", *parts],
        f"Bias ({attribute})": [bias],
        "Fréchet distance": ["val/samples/frechet_distance"],
    }
    present = {title: [tag for tag in tags if tag in scalars] for title, tags in wanted.items()}
    panels = [(title, tags) for title, tags in present.items() if tags]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for place, (title, tags) in zip(axes[0], panels, strict=True):
        for tag in tags:
            steps, values = scalars[tag]
            smooth = _smoothed(values) if tag.startswith("train/") else values
            marker = "" if tag.startswith("train/") else "o"
            place.plot(steps, smooth, marker=marker, label=tag.removeprefix("train/"))
        ends = [f"interval/{attribute}_{end}" for end in ("low", "high")]
        if tags == [bias] and set(ends) <= set(scalars):
            (steps, low), (_, high) = (scalars[end] for end in ends)
            place.fill_between(steps, low, high, alpha=0.2)
            place.set_ylim(0, 1.05)
        place.set_title(plain(title), fontsize=10)
        place.set_xlabel("step")
        if len(tags) > 1:
            place.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
    return True


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute TensorBoard's exponential average, corrected for its start at zero."""
    smooth, average = np.empty_like(values), 0.0
    for number, value in enumerate(values):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * value
        smooth[number] = average / (1 - _SMOOTHING ** (number + 1))
    return smooth


def pareto_points(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return Bias and Fréchet distance at every invariant scale.

    Args:
        metrics: the content of ``samples/metrics.json``.

    Returns:
        ``label``, ``bias``, ``interval`` and ``distance`` of each scale that has a distance.
    """
    points = [
        {
            "label": f"s = {float(scale):g}",
            "bias": figures["bias"]["mean"],
            "interval": figures["bias"]["interval"],
            "distance": figures["frechet_distance"],
        }
        for scale, figures in (metrics["scales"] or {}).items()
    ]
    return [point for point in points if isinstance(point["distance"], float)]


def pareto_front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points that no other beats in both Bias and distance, sorted by distance."""
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["distance"], p["bias"])):
        if not front or point["bias"] < front[-1]["bias"]:
            front.append(point)
    return front


def plot_pareto(points: list[dict[str, Any]], path: Path) -> None:
    """Plot Bias with its interval against Fréchet distance, and the Pareto front."""
    figure, axes = plt.subplots(figsize=(5.5, 3.8))
    for point in points:
        low, high = point["interval"]
        errors = [[max(0, point["bias"] - low)], [max(0, high - point["bias"])]]
        axes.errorbar(point["distance"], point["bias"], errors, fmt="o", color="C0", capsize=3)
        where = (point["distance"], point["bias"])
        axes.annotate(point["label"], where, (6, 4), textcoords="offset points", fontsize=8)
    front = pareto_front(points)
    edge = [p["distance"] for p in front], [p["bias"] for p in front]
    axes.plot(*edge, "o-", color="C1", markersize=10, fillstyle="none", label="Pareto front")
    axes.set_xlabel("Fréchet distance")
    axes.set_ylabel("Bias")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    axes.legend(frameon=False)
    save_figure(figure, path)
