"""Writing a run's report: ``report.json`` for scripts; Markdown, HTML and pictures for people."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invdiff_pl.report.blocks import to_html, to_markdown
from invdiff_pl.report.calibration import read_calibration
from invdiff_pl.report.content import report_blocks
from invdiff_pl.report.curves import pareto_points, plot_curves, plot_pareto
from invdiff_pl.report.heldout import read_held_out
from invdiff_pl.report.hparams import write_hparams
from invdiff_pl.report.plots import plot_bias, plot_environments, write_grids
from invdiff_pl.utils.files import digest_file, read_json, write_json, write_text
from invdiff_pl.workflow.provenance import provenance
from invdiff_pl.workflow.records import RECORD

OLDER = {"reason": "samples scored by an earlier version: remove the samples folder and rerun"}
MANIFOLD = ("precision", "recall", "density", "coverage")
TIMED = ("data", "classifier", "environments", "adapter", "samples", "augmentation")


def write_report(run_dir: Path, seed: int) -> dict[str, Any]:
    """Gather what the stages wrote into ``RUN/report``.

    Returns:
        the content of ``report.json``.

    Raises:
        InvDiffError: if a stage has not run.
    """
    metrics = read_json(run_dir / "samples" / "metrics.json")
    environments = read_json(run_dir / "environments" / "environments.json")
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    report = collect(run_dir, metrics, environments, seed)
    write_json(folder / "report.json", report)
    blocks = report_blocks(report, _draw(run_dir, folder, metrics, environments))
    write_text(folder / "report.md", to_markdown(blocks))
    write_text(folder / "report.html", to_html(blocks, folder))
    write_hparams(run_dir, report, read_json(run_dir / "samples" / RECORD))
    return report


def _draw(
    run_dir: Path, folder: Path, metrics: dict[str, Any], environments: dict[str, Any]
) -> dict[str, Sequence[str]]:
    """Draw the pictures; return files by what they show, relative to the report's folder."""
    for name in ("bias", "pareto", "curves"):
        (folder / f"{name}.png").unlink(missing_ok=True)
    if is_scored(metrics):
        plot_bias(metrics, folder / "bias.png")
    points = pareto_points(metrics)
    if len(points) > 2:  # before and after alone are in the table
        plot_pareto(points, folder / "pareto.png")
    plot_environments(run_dir / "environments", environments["prompts"], folder / "scores.png")
    write_grids(run_dir / "samples", folder / "grid.png")
    attribute = metrics.get("attribute", "attribute")
    plot_curves(run_dir / "tensorboard" / "adapter", attribute, folder / "curves.png")
    names = ("bias", "pareto", "scores", "grid", "curves")
    drawn = {name: [f"{name}.png"] if (folder / f"{name}.png").is_file() else [] for name in names}
    if (run_dir / "sweep" / "sweep.png").is_file():
        drawn["pareto"].append("../sweep/sweep.png")
    number = environments["candidate"]
    folder = run_dir / "environments" / f"candidate-{number}"
    sheets = sorted(folder.glob("sheet-*.png"))
    return {**drawn, "sheets": [f"../environments/{folder.name}/{s.name}" for s in sheets]}


def collect(
    run_dir: Path, metrics: dict[str, Any], environments: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Collect the content of ``report.json``."""
    sample_record = read_json(run_dir / "samples" / RECORD)
    adapter = read_json(run_dir / "adapter" / "adapter" / "adapter.json")
    seconds = {
        name: read_json(run_dir / name / RECORD)["seconds"]
        for name in TIMED
        if (run_dir / name / RECORD).is_file()
    }
    quality = environments["quality"]
    return {
        "experiment": sample_record["config"]["experiment"]["name"],
        "scale": sample_record["config"]["experiment"]["scale"],
        "seed": seed,
        **provenance(),
        "replay": f"python -m invdiff_pl replay {shlex.quote(str(run_dir))}",
        **figures(metrics),
        "environments": {
            "groups": environments["groups"],
            "features": environments["features"],
            "auc": quality.get("auc"),
            "worst_group_recall": quality.get("worst_group_recall"),
            "bias_found": environments["bias_found"],
            "verdict": environments["verdict"],
            "verdict_reason": environments["reason"],
            "candidate": environments["candidate"],
            "trained_on": adapter.get("candidates", []),
            "candidates": environments["candidates"],
            "prompts": environments["prompts"],
            "reason": _environment_reason(metrics, environments),
            "quality": quality,
        },
        "adapter": {
            "kind": adapter["kind"],
            "settings": adapter["settings"],
            "parameters": adapter["parameters"],
            "share": adapter["share"],
            "trained": adapter.get("trained", True),
            "reason": adapter.get("reason"),
        },
        "held_out": read_held_out(run_dir),
        "calibration": read_calibration(run_dir),
        **augmentation(run_dir),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
    }


def _environment_reason(metrics: dict[str, Any], environments: dict[str, Any]) -> str | None:
    reasons = []
    if environments["bias_found"] is None:
        reasons.append(environments["reason"])
    if not is_scored(metrics):
        reasons.append(f"AUC and recall: {metrics['reason']}")
    return "; ".join(reasons) or None


def augmentation(run_dir: Path) -> dict[str, Any]:
    """Return worst-group accuracy with debiased samples, if the stage has run on these samples."""
    file = run_dir / "augmentation" / "augmentation.json"
    if not file.is_file():
        return {}
    found = read_json(file)
    if found["samples"] != digest_file(run_dir / "samples" / "metrics.json"):
        return {}  # measured on samples that have been drawn anew since
    return {"augmentation": found}


def is_scored(metrics: dict[str, Any]) -> bool:
    """Return whether the samples could be scored, which takes attribute labels."""
    return metrics["scales"] is not None


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured on the samples, or ``None`` and the reason for each figure."""
    count = {"samples_per_prompt": metrics["samples_per_prompt"]}
    if not is_scored(metrics):
        nothing = absent(metrics["reason"])
        return {
            "bias": {**nothing, "data": None, **count},
            **dict.fromkeys(("prompt_accuracy", "frechet_distance", *MANIFOLD, "clip_t"), nothing),
            "distances": {},
            "classifier": None,
        }
    first, *_, last = list(metrics["scales"].values())
    return {
        "bias": {
            "attribute": metrics.get("attribute"),
            "before": first["bias"],
            "after": last["bias"],
            "data": metrics["data"]["bias"],
            **intersection(first, last),
            **count,
        },
        "prompt_accuracy": {
            "before": first["prompt_accuracy"]["mean"],
            "after": last["prompt_accuracy"]["mean"],
            "interval_before": first["prompt_accuracy"]["interval"],
            "interval_after": last["prompt_accuracy"]["interval"],
        },
        "frechet_distance": {
            **metrics["frechet_distance"],
            **before_and_after(first["frechet_distance"], last["frechet_distance"]),
        },
        "distances": {
            name: {
                **metrics["distances"].get(name, {}),
                **before_and_after(found, last["distances"][name]),
            }
            for name, found in first.get("distances", {}).items()
        },
        **manifold_figures(metrics),
        "clip_t": clip_figures(metrics),
        "classifier": metrics["classifier"],
    }


def before_and_after(first: Any, last: Any) -> dict[str, Any]:
    """Return a figure before and after, or the reason why it is missing."""
    for found in (first, last):
        if isinstance(found, dict):
            return absent(found["reason"])
    return {"before": first, "after": last}


def intersection(first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """Return Bias over two attributes at once, if a second classifier was given."""
    if "intersection" not in first:
        return {}
    before, after = first["intersection"], last["intersection"]
    names = before["second_attribute"]
    return {"intersection": {"second_attribute": names, "before": before, "after": after}}


def manifold_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return precision, recall, density and coverage before and after."""
    before, *_, after = (f.get("manifold", OLDER) for f in metrics["scales"].values())
    if "reason" in before:
        return dict.fromkeys(MANIFOLD, absent(before["reason"]))
    named = {
        "neighbours": metrics["manifold"]["neighbours"],
        "extractor": metrics["frechet_distance"].get("extractor"),
    }
    return {name: {"before": before[name], "after": after[name], **named} for name in MANIFOLD}


def clip_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return CLIP-T before and after."""
    before, *_, after = (f.get("clip_t", OLDER) for f in metrics["scales"].values())
    if "reason" in before:
        return absent(before["reason"])
    return {"before": before["mean"], "after": after["mean"]}


def absent(reason: str) -> dict[str, Any]:
    """Return the entry of a figure that was not measured, with the reason."""
    return {"before": None, "after": None, "reason": reason}
