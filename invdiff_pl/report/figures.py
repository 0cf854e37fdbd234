"""A report's table of bias and quality, before and after."""

from collections.abc import Sequence
from typing import Any

from invdiff_pl.report.blocks import Block, Table, Text

# Held-out accuracy below which the classifier's figures are called untrustworthy.
TRUSTED_ACCURACY = 0.95
TITLES = {"fid": "FID", "fd_dinov2": "FD-DINOv2", "cmmd": "CMMD"}


def figure_blocks(report: dict[str, Any]) -> list[Block]:
    """Return the table, and warnings about figures that are not to be trusted."""
    rows = [*_bias_rows(report["bias"]), *_quality_rows(report)]
    table = Table(["", "training data", "before", "after"], rows)
    return [table, *(Text(warning) for warning in _warnings(report))]


def _bias_rows(bias: dict[str, Any]) -> list[list[str]]:
    keys = ("data", "before", "after")
    rows = [["Bias, mean over prompts", *(estimate_text(bias[key]) for key in keys)]]
    if "corrected_mean" in bias["after"]:
        cells = [f"{bias[key]['corrected_mean']:.3f}" for key in keys]
        rows.append(["— corrected for small samples", *cells])
    corrected = [bias[key].get("classifier_corrected", {}) for key in keys[1:]]
    if all("mean" in found for found in corrected):
        rows.append(["— corrected for classifier errors", "", *map(estimate_text, corrected)])
    aim = bias["after"].get("target", "even")
    shares = "even shares" if aim == "even" else "the target shares"
    for name, title in (("total_variation", "Total variation"), ("kl", "KL divergence (nats)")):
        cells = [f"{_mean(bias[key], name):.3f}" for key in keys]
        rows.append([f"{title} from {shares}", *cells])
    if (both := bias.get("intersection")) is not None:
        title = f"Bias over both attributes at once (second: {', '.join(both['second_attribute'])})"
        rows.append([title, "", *(estimate_text(both[key]) for key in keys[1:])])
    return rows


def _quality_rows(report: dict[str, Any]) -> list[list[str]]:
    accuracy, distance = report["prompt_accuracy"], report["frechet_distance"]
    cells = [
        f"{100 * accuracy[key]:.1f} % {interval_text(accuracy[f'interval_{key}'], 100, 1)}"
        for key in ("before", "after")
    ]
    rows = [["Prompt accuracy", "", *cells]]
    main = {
        **distance,
        "title": f"Fréchet distance ({distance.get('extractor')}) to a balanced set",
    }
    others = [
        {**found, "title": f"{TITLES[name]} ({found.get('extractor')})"}
        for name, found in report.get("distances", {}).items()
    ]
    rows += [
        [found["title"], "", f"{found['before']:.2f}", f"{found['after']:.2f}"]
        for found in (main, *others)
        if found["before"] is not None
    ]
    rows += [
        [
            f"{name.capitalize()} (k = {report[name]['neighbours']}, same features)",
            "",
            f"{report[name]['before']:.3f}",
            f"{report[name]['after']:.3f}",
        ]
        for name in ("precision", "recall")
        if report[name]["before"] is not None
    ]
    clip = report["clip_t"]
    if clip["before"] is not None:
        rows.append(["CLIP-T", "", f"{clip['before']:.2f}", f"{clip['after']:.2f}"])
    return rows


def _warnings(report: dict[str, Any]) -> list[str]:
    """Return warnings about figures that are not to be trusted."""
    weak = [
        f"{100 * accuracy:.1f} % ({name})"
        for name, accuracy in report["classifier"].items()
        if accuracy < TRUSTED_ACCURACY
    ]
    if not weak:
        return []
    return [
        f"**Warning:** on held-out images the classifier is right on only {', '.join(weak)}, so "
        "do not trust figures that depend on it (Bias, prompt accuracy); train it on more labelled "
        "images."
    ]


def _mean(bias: dict[str, Any], name: str) -> float:
    values = [entry[name] for entry in bias["per_prompt"].values()]
    return sum(values) / len(values)


def estimate_text(figure: dict[str, Any], name: str = "mean") -> str:
    """Format a figure, whose key is ``name``, with its ``interval``."""
    return f"{figure[name]:.3f} {interval_text(figure['interval'])}"


def interval_text(interval: Sequence[float], factor: float = 1, digits: int = 3) -> str:
    """Format an interval in brackets."""
    low, high = (f"{factor * value:.{digits}f}" for value in interval)
    return f"[{low}, {high}]"
