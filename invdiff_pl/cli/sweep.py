"""``sweep``: what a run's adapter costs and gains at several invariant and guidance scales."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from invdiff_pl.cli.lightning import build
from invdiff_pl.report.pareto import mark_pareto, plot_sweep, sweep_markdown
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import (
    digest_folder,
    digest_json,
    is_file,
    read_json,
    write_json,
    write_text,
)

INVARIANT_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)
# Guidance scales other than the run's own are measured at these invariant scales only.
BEFORE_AND_AFTER = (0.0, 1.0)


def run_sweep(arguments: Sequence[str]) -> None:
    """Sample the runs at every scale, score the samples, and write a table and a plot.

    Raises:
        InvDiffError: if a run is not finished or has no labels, or a scale is negative or has more
            than two decimals.
    """
    options = _parser().parse_args(arguments)
    for name in ("invariant_scales", "guidance_scales"):
        if any(round(scale, 2) != scale or scale < 0 for scale in getattr(options, name)):
            raise InvDiffError(
                f"--{name.replace('_', '-')}: expected numbers from 0 on with at most two decimals."
            )
    points = []
    for run_dir in options.runs:
        own = sweep_run(
            run_dir, options.invariant_scales, options.guidance_scales, options.samples_per_prompt
        )
        _write(run_dir / "sweep", own)
        points += own
    if len(options.runs) > 1:
        folder = options.output or options.runs[0] / "sweep" / "together"
        _write(folder, points)
    else:
        folder = options.runs[0] / "sweep"
    print((folder / "sweep.md").read_text(encoding="utf-8"))
    print(f"table and plot: {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m invdiff_pl sweep", allow_abbrev=False)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished run folders")
    parser.add_argument(
        "--invariant-scales", type=float, nargs="+", default=list(INVARIANT_SCALES), metavar="S"
    )
    parser.add_argument(
        "--guidance-scales",
        type=float,
        nargs="*",
        default=list(GUIDANCE_SCALES),
        metavar="W",
        help="besides the run's own, each at invariant scales 0 and 1",
    )
    parser.add_argument("--samples-per-prompt", type=int, default=128, metavar="N")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for several runs' table (default: FIRST_RUN/sweep/together)",
    )
    return parser


def sweep_run(
    run_dir: Path,
    invariant_scales: Sequence[float],
    guidance_scales: Sequence[float],
    samples_per_prompt: int,
) -> list[dict[str, Any]]:
    """Measure the figures of a run at every scale; what was measured before is kept.

    Args:
        run_dir: folder of a finished run, whose data, backbone, sampler and evaluation are used.
        invariant_scales: invariant scales to measure at the run's own guidance scale.
        guidance_scales: further guidance scales, to measure at invariant scales 0 and 1.
        samples_per_prompt: number of samples per prompt at each pair of scales, drawn from the same
            noise at all of them.

    Returns:
        one entry per pair of scales, JSON-serialisable.
    """
    config = run_dir / "samples" / "config.yaml"
    if not is_file(config) or not is_file(run_dir / "samples" / "stage.json"):
        raise InvDiffError(
            f"--runs: {run_dir} is not a finished run: run `make train RUN_DIR={run_dir}` first."
        )
    # The sampler is built from the file, as the run was sampled with these settings.
    sampler = build(["predict", f"--config={config}"]).model
    own = float(sampler.guidance_scale)
    plan = {own: sorted(set(invariant_scales))}
    plan |= {scale: list(BEFORE_AND_AFTER) for scale in guidance_scales if scale != own}
    points = []
    for guidance, scales in sorted(plan.items()):
        metrics = _measure(run_dir, config, guidance, scales, samples_per_prompt)
        points += [
            _point(run_dir, guidance, scale, metrics["scales"][str(scale)]) for scale in scales
        ]
    return points


def score_samples(config: Path, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Sample and evaluate as a run did, into another folder.

    Args:
        config: the run's ``samples/config.yaml``.
        folder: folder for images and ``metrics.json``; existing images are kept.
        overrides: flags that follow the file and override it.

    Returns:
        the content of ``metrics.json``.
    """
    place = f"--trainer.default_root_dir={folder}"
    built = build(["predict", f"--config={config}", place, *overrides])
    for callback in built.trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "output"):
            callback.output = folder
    built.trainer.predict(built.model, datamodule=built.datamodule, return_predictions=False)
    metrics: dict[str, Any] = read_json(folder / "metrics.json")
    if metrics["scales"] is None:
        raise InvDiffError(f"{config}: nothing can be scored: {metrics['reason']}.")
    return metrics


def _measure(
    run_dir: Path, config: Path, guidance: float, scales: Sequence[float], samples_per_prompt: int
) -> dict[str, Any]:
    """Return the metrics at one guidance scale, kept in ``RUN/sweep/guidance-W``."""
    folder = run_dir / "sweep" / f"guidance-{guidance:.2f}"
    key = digest_json(
        {
            "config": config.read_text(encoding="utf-8"),
            "adapter": digest_folder(run_dir / "adapter" / "adapter"),
            "samples_per_prompt": samples_per_prompt,
        }
    )
    record = folder / "measured.json"
    known = read_json(record) if record.is_file() else {}
    if known.get("key") != key and folder.exists():
        shutil.rmtree(folder)
    elif known.get("scales") == list(scales):
        return read_json(folder / "metrics.json")
    # Images of an interrupted or shorter sweep with the same key are kept and completed.
    write_json(record, {"key": key, "scales": None})
    print(f"{run_dir}: guidance scale {guidance:g}, invariant scales {list(scales)}", flush=True)
    metrics = score_samples(
        config,
        folder,
        [
            f"--model.invariant_scales={list(scales)}",
            f"--model.guidance_scale={guidance}",
            f"--data.samples_per_prompt={samples_per_prompt}",
        ],
    )
    write_json(record, {"key": key, "scales": list(scales)})
    return metrics


def _point(run_dir: Path, guidance: float, scale: float, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": str(run_dir),
        "guidance_scale": guidance,
        "invariant_scale": scale,
        **point_figures(figures),
    }


def point_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that tables compare, from one scale's entry in ``metrics.json``."""
    manifold = figures.get("manifold") or {}
    return {
        "bias": figures["bias"]["mean"],
        "bias_interval": figures["bias"]["interval"],
        "prompt_accuracy": figures["prompt_accuracy"]["mean"],
        "frechet_distance": figures["frechet_distance"],
        "precision": manifold.get("precision"),
        "recall": manifold.get("recall"),
    }


def _write(folder: Path, points: list[dict[str, Any]]) -> None:
    mark_pareto(points)
    write_json(folder / "sweep.json", points)
    write_text(folder / "sweep.md", sweep_markdown(points))
    plot_sweep(points, folder / "sweep.png")
