"""A run's report: ``report.json`` for scripts, ``report.md`` and pictures for people."""

from pathlib import Path
from typing import Any

from invdiff_pl.files import read_json, write_json, write_text
from invdiff_pl.provenance import provenance
from invdiff_pl.report.heldout import read_held_out
from invdiff_pl.report.plots import plot_bias, plot_environments, write_grids
from invdiff_pl.report.tables import markdown
from invdiff_pl.stages import RECORD

OLDER = {"reason": "measured by later versions only: remove the samples folder and rerun"}
MANIFOLD = ("precision", "recall", "density", "coverage")
TIMED = ("data", "classifier", "environments", "adapter", "samples")


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
    if is_scored(metrics):
        plot_bias(metrics, folder / "bias.png")
    plot_environments(run_dir / "environments", environments["prompts"], folder / "scores.png")
    write_grids(run_dir / "samples", folder / "grid.png")
    write_text(folder / "report.md", markdown(report))
    return report


def collect(
    run_dir: Path, metrics: dict[str, Any], environments: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The content of ``report.json``."""
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
        **figures(metrics),
        "environments": {
            "groups": environments["groups"],
            "score": environments["score"],
            "split_half_rank_correlation": environments["split_half_rank_correlation"],
            "auc": quality.get("auc"),
            "worst_group_recall": quality.get("worst_group_recall"),
            "bias_found": None,
            "reason": "whether there is a bias at all is not tested by this version"
            + ("" if is_scored(metrics) else f"; AUC and recall: {metrics['reason']}"),
            "quality": quality,
        },
        "adapter": {
            "kind": adapter["kind"],
            "settings": adapter["settings"],
            "parameters": adapter["parameters"],
            "share": adapter["share"],
        },
        "held_out": read_held_out(run_dir),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
    }


def is_scored(metrics: dict[str, Any]) -> bool:
    """Whether the samples could be scored: that takes attribute labels."""
    return metrics["scales"] is not None


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """What was measured on the samples, or ``None`` for each figure and why."""
    count = {"samples_per_prompt": metrics["samples_per_prompt"]}
    if not is_scored(metrics):
        nothing = absent(metrics["reason"])
        return {
            "bias": {**nothing, "data": None, **count},
            **dict.fromkeys(("prompt_accuracy", "frechet_distance", *MANIFOLD, "clip_t"), nothing),
            "classifier": None,
        }
    first, *_, last = list(metrics["scales"].values())
    return {
        "bias": {
            "before": first["bias"],
            "after": last["bias"],
            "data": metrics["data"]["bias"],
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
            "before": first["frechet_distance"],
            "after": last["frechet_distance"],
        },
        **manifold_figures(metrics),
        "clip_t": clip_figures(metrics),
        "classifier": metrics["classifier"],
    }


def manifold_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Precision, recall, density and coverage before and after."""
    before, *_, after = (f.get("manifold", OLDER) for f in metrics["scales"].values())
    if "reason" in before:
        return dict.fromkeys(MANIFOLD, absent(before["reason"]))
    named = {
        "neighbours": metrics["manifold"]["neighbours"],
        "extractor": metrics["frechet_distance"]["extractor"],
    }
    return {name: {"before": before[name], "after": after[name], **named} for name in MANIFOLD}


def clip_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """CLIP-T before and after."""
    before, *_, after = (f.get("clip_t", OLDER) for f in metrics["scales"].values())
    if "reason" in before:
        return absent(before["reason"])
    return {"before": before["mean"], "after": after["mean"]}


def absent(reason: str) -> dict[str, Any]:
    """A figure that was not taken, and why."""
    return {"before": None, "after": None, "reason": reason}
