"""A run's settings and final figures, for TensorBoard's HPARAMS page."""

from pathlib import Path
from typing import Any

import yaml

from invdiff_pl.utils.files import atomic_path

# Arguments that are given elsewhere, or that concern one machine only.
_NOT_SETTINGS = ("output", "backbone", "seed", "adapter", "adapter_settings", "_instantiator")


def write_hparams(run_dir: Path, report: dict[str, Any], samples_record: dict[str, Any]) -> None:
    """Write the event file of ``tensorboard/result`` anew.

    Each run is one row of the page: ``tensorboard --logdir runs`` compares all runs below ``runs``.

    Args:
        run_dir: the run folder.
        report: the content of ``report.json``.
        samples_record: the record of the samples stage.
    """
    from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415 - takes seconds
    from torch.utils.tensorboard.writer import SummaryWriter  # noqa: PLC0415

    settings = final_settings(run_dir, report, samples_record)
    figures = final_figures(report)
    with atomic_path(run_dir / "tensorboard" / "result") as partial:
        writer = SummaryWriter(str(partial))
        for summary in hparams(settings, figures):
            writer._get_file_writer().add_summary(summary)
        for tag, value in figures.items():
            writer.add_scalar(tag, value, 0)
        writer.close()


def final_settings(
    run_dir: Path, report: dict[str, Any], samples_record: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings by name: numbers, strings and truth values."""
    sampler = samples_record["config"].get("model", {}).get("init_args", {})
    found: dict[str, Any] = {
        "experiment": report["experiment"],
        "scale": report["scale"],
        "seed": report["seed"],
        "environments/groups": report["environments"]["groups"],
        "environments/features": report["environments"]["features"],
        "samples/steps": sampler.get("steps"),
        "samples/guidance_scale": sampler.get("guidance_scale"),
        "samples/per_prompt": report["bias"]["samples_per_prompt"],
        "adapter/kind": report["adapter"]["kind"],
    }
    logged = run_dir / "tensorboard" / "adapter" / "hparams.yaml"
    if logged.is_file():
        trained = yaml.safe_load(logged.read_text(encoding="utf-8")) or {}
        chosen = {name: value for name, value in trained.items() if name not in _NOT_SETTINGS}
        found |= _flat("adapter", chosen)
    found |= _flat("adapter", report["adapter"]["settings"])
    return {name: value for name, value in found.items() if isinstance(value, int | float | str)}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        parts = (_flat(f"{name}/{key}", part) for key, part in value.items())
        return {key: part for flat in parts for key, part in flat.items()}
    return {name: ", ".join(map(str, value)) if isinstance(value, list) else value}


def final_figures(report: dict[str, Any]) -> dict[str, float]:
    """Return the measured figures by tag.

    Bias comes first, since the page shows five figures until others are ticked.
    """
    bias, quality = report["bias"], report["environments"]["quality"]
    attribute = bias.get("attribute") or "attribute"
    found = {
        f"final/bias/{attribute}_{when}": bias[when]["mean"]
        for when in ("after", "before")
        if bias[when] is not None
    }
    found |= {
        "final/prompt_accuracy": report["prompt_accuracy"]["after"],
        "final/frechet_distance": report["frechet_distance"]["after"],
        "final/precision": report["precision"]["after"],
        "final/recall": report["recall"]["after"],
        "final/clip_t": report["clip_t"]["after"],
        "final/environment_auc": quality.get("auc"),
        "final/seconds": float(report["seconds"]["total"]),
    }
    for name, distance in report.get("distances", {}).items():
        found[f"final/{name}"] = distance["after"]
    return {tag: float(value) for tag, value in found.items() if value is not None}
