"""The pictures of a report."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from invdiff_pl.data.samples import Sample, read_manifest
from invdiff_pl.utils.files import atomic_path
from invdiff_pl.utils.labels import font, plain, prompt_label

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_COLUMNS = 12
_GAP = 6
_ROW_NAMES = {1: ["samples"], 2: ["before", "after"]}
LABEL_WIDTH = 210
_FONT = 13  # pixels
_ZOOM_TO = 64


def plot_bias(metrics: dict[str, Any], path: Path) -> None:
    """Plot every prompt's Bias in the data, before and after, the latter two with intervals."""
    scales = list(metrics["scales"].values())
    series = {
        "training data": metrics["data"]["bias"],
        "before": scales[0]["bias"],
        "after": scales[-1]["bias"],
    }
    prompts = list(series["after"]["per_prompt"])
    figure, axes = plt.subplots(figsize=(1.5 + 1.2 * len(prompts), 3.6))
    width = 0.26
    for offset, (name, bias) in enumerate(series.items()):
        values = np.array([bias["per_prompt"][prompt]["bias"] for prompt in prompts])
        ends = np.array([bias["per_prompt"][prompt]["interval"] for prompt in prompts]).T
        errors = np.abs(ends - values) if name != "training data" else None
        places = np.arange(len(prompts)) + (offset - 1) * width
        axes.bar(places, values, width, yerr=errors, capsize=3, label=name)
    labels = [plain(prompt_label(prompt, number)) for number, prompt in enumerate(prompts)]
    axes.set_xticks(range(len(prompts)), labels)
    axes.tick_params(axis="x", rotation=20)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("Bias")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.15))
    save_figure(figure, path)


def plot_environments(folder: Path, prompts: list[str], path: Path) -> None:
    """Plot a histogram of the scores, coloured by environment."""
    tensors = load_file(folder / "environments.safetensors")
    scores, assignments = tensors["scores"], tensors["assignments"]
    low, high = np.quantile(scores, (0.001, 0.999))
    bins = np.linspace(float(low), float(high), 60).tolist()
    figure, axes = plt.subplots(figsize=(6, 3))
    for environment in np.unique(assignments):
        chosen = scores[assignments == environment]
        axes.hist(chosen, bins, alpha=0.7, label=f"environment {environment} ({len(chosen)})")
    axes.set_yscale("log")
    axes.set_xlabel("score (high if an image is unusual for its prompt)")
    axes.set_ylabel("images")
    axes.set_title(f"{len(scores)} images of {len(prompts)} prompts", fontsize=10)
    axes.legend(frameon=False)
    save_figure(figure, path)


def write_grids(samples: Path, path: Path, columns: int = _COLUMNS) -> None:
    """Draw each prompt's first samples: a row before and, from the same noise, one after below."""
    manifest = read_manifest(samples)
    scales = sorted({sample.invariant_scale for sample in manifest})
    shown = [scales[0], scales[-1]] if len(scales) > 1 else scales
    by_row: dict[tuple[int, float], list[Sample]] = {}
    for sample in manifest:
        row = by_row.setdefault((sample.prompt_number, sample.invariant_scale), [])
        if len(row) < columns:
            row.append(sample)
    blocks = []
    for prompt in sorted({sample.prompt_number for sample in manifest}):
        rows = [_row(samples, by_row[prompt, scale]) for scale in shown]
        name = prompt_label(by_row[prompt, shown[0]][0].prompt, prompt)
        blocks.append(_labelled(np.concatenate(rows), [name, *_ROW_NAMES[len(shown)]]))
        blocks.append(np.full((_GAP, blocks[-1].shape[1], 3), 255, dtype=np.uint8))
    with atomic_path(path) as partial:
        Image.fromarray(np.concatenate(blocks[:-1])).save(partial, format="PNG")


def _labelled(block: NDArray[np.uint8], text: list[str]) -> NDArray[np.uint8]:
    """Put the prompt's label and a name for each row to the left of a block."""
    label = Image.new("RGB", (LABEL_WIDTH, len(block)), "white")
    draw = ImageDraw.Draw(label)
    prompt, *names = text
    draw.text((4, 4), prompt, fill="black", font=font(_FONT))
    for number, name in enumerate(names):
        place = (4, 26 + number * len(block) // len(names))
        draw.text(place, name, fill="grey", font=font(_FONT))
    return np.concatenate([np.asarray(label), block], axis=1)


def _row(folder: Path, samples: list[Sample]) -> NDArray[np.uint8]:
    tiles = []
    for sample in samples:
        with Image.open(folder / sample.file) as image:
            # Small images are enlarged by a whole number, large ones reduced.
            side = min(image.width * max(1, _ZOOM_TO // image.width), 2 * _ZOOM_TO)
            smooth = Image.Resampling.LANCZOS if side < image.width else Image.Resampling.NEAREST
            tiles.append(np.asarray(image.resize((side, side), smooth)))
    return np.concatenate(tiles, axis=1)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it."""
    figure.tight_layout()
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    plt.close(figure)
