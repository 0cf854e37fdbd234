"""What each part of the method is worth: one adapter per row, on a finished run's backbone.

    python benchmarks/ablation.py runs/waterbirds/mini
    python benchmarks/ablation.py runs/waterbirds/mini --rows ours oracle --steps 50

Every row trains an adapter with the run's settings, except for what the row changes, samples from
the same noise, and scores with the run's classifier. Rows are kept in RUN/ablation/rows: the same
command goes on where it was stopped, and redoes rows whose settings changed. The table goes to
RUN/ablation/ablation.md and .json.

Rows `oracle` and `oracle_minority` take their environments from attribute labels, which no user
has. They are made here, on the scoring side: training reads environment files only, and has no
access to labels.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablation_groups import write_groups
from ablation_rows import ROWS, SECTIONS, Row

from invdiff_pl.callbacks import (
    ExponentialMovingAverage,
    HeldOutSelection,
    SaveAdapter,
    ScaleCalibration,
)
from invdiff_pl.cli.lightning import build
from invdiff_pl.cli.sweep import point_figures, score_samples
from invdiff_pl.report.figures import interval_text
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_file, digest_json, read_json, write_json, write_text
from invdiff_pl.utils.quiet import silence

HEADER = (
    "row",
    "environments",
    "parameters",
    "share",
    "training, s",
    "scale",
    "Bias",
    "prompt accuracy",
    "Fréchet distance",
    "recall",
)


def main() -> int:
    """Run the missing rows, and print the table."""
    return run_rows(_run, _parser().parse_args())


def run_rows(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Run a table's rows; bad input gives one line and exit status 2."""
    silence()
    try:
        run(options)
    except InvDiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def add_rows(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add the option that chooses a table's rows."""
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(names),
        default=list(names),
        metavar="ROW",
        help=f"all otherwise; of: {', '.join(names)}",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="finished run folder")
    add_rows(parser, list(ROWS))
    parser.add_argument("--steps", type=int, help="optimizer steps; the run's otherwise")
    parser.add_argument("--samples-per-prompt", type=int, help="the run's otherwise")
    parser.add_argument("--precision", help="of training, such as bf16-mixed; the run's otherwise")
    parser.add_argument("--seed", type=int, default=0, help="of random groups")
    parser.add_argument("--output", type=Path, help="RUN/ablation otherwise")
    return parser


def _run(options: argparse.Namespace) -> None:
    run_dir: Path = options.run_dir
    configs = {
        "fit": run_dir / "tensorboard" / "adapter" / "config.yaml",
        "predict": run_dir / "samples" / "config.yaml",
    }
    for config in configs.values():
        if not config.is_file():
            raise InvDiffError(f"{config} is missing: finish the run first (`make train`).")
    output: Path = options.output or run_dir / "ablation"
    for name in options.rows:
        _run_row(ROWS[name], options, configs, output)
    done = {name: output / "rows" / f"{name}.json" for name in ROWS}
    results = {name: read_json(path) for name, path in done.items() if path.is_file()}
    write_json(output / "ablation.json", results)
    write_text(output / "ablation.md", table(results))
    print(table(results))


def _run_row(row: Row, options: argparse.Namespace, configs: dict[str, Path], output: Path) -> None:
    """Train, sample and score one row, unless it is on record."""
    record = output / "rows" / f"{row.name}.json"
    groups = write_groups(row.groups, configs["fit"], output / "environments", options.seed)
    key = digest_json(
        {
            "row": asdict(row),
            "environments": digest_file(groups / "environments.safetensors"),
            "configs": [config.read_text(encoding="utf-8") for config in configs.values()],
            "steps": options.steps,
            "precision": options.precision,
            "samples_per_prompt": options.samples_per_prompt,
        }
    )
    if record.is_file() and read_json(record)["key"] == key:
        print(f"{row.name}: up to date", flush=True)
        return
    print(f"{row.name}: {row.says}", flush=True)
    folder = output / "work" / f"{row.name}-{key[:8]}"
    trained: dict[str, Any] = {}
    if not row.untrained:
        settings = {"steps": options.steps, "precision": options.precision}
        trained = train_adapter(row, configs["fit"], groups, folder, **settings)
    scale = 0.0 if row.untrained else 1.0
    flags = [f"--model.invariant_scales=[{scale}]"]
    if not row.untrained:
        flags.append(f"--model.adapter={folder / 'adapter'}")
    if options.samples_per_prompt:
        flags.append(f"--data.samples_per_prompt={options.samples_per_prompt}")
    metrics = score_samples(configs["predict"], folder / "samples", flags)
    figures = point_figures(metrics["scales"][str(scale)])
    told = {"key": key, "row": row.name, "says": row.says, "groups": row.groups}
    write_json(record, {**told, **trained, **figures})


def train_adapter(
    row: Row,
    config: Path,
    groups: Path,
    folder: Path,
    *,
    steps: int | None = None,
    precision: str | None = None,
) -> dict[str, Any]:
    """Train a row's adapter.

    Args:
        row: the row, which says what is changed.
        config: resolved settings of a run's adapter stage.
        groups: folder of the environments.
        folder: folder to whose ``adapter`` folder the adapter is written.
        steps: number of optimizer steps; the run's if not given.
        precision: precision of training; the run's if not given.

    Returns:
        its size, the time it took, and the scale it was calibrated to, JSON-serialisable.
    """
    flags = [
        f"--data.environments={groups}",
        # Training is what is compared, even where the inference would have advised against it.
        "--model.train_without_bias=true",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        *row.flags(),
    ]
    if precision:
        flags.append(f"--trainer.precision={precision}")
    if steps:
        flags.append(f"--trainer.max_steps={steps}")
    built = build(["fit", f"--config={config}", *flags])
    kept: tuple[type, ...] = ExponentialMovingAverage, HeldOutSelection, SaveAdapter
    if row.calibrated:
        kept += (ScaleCalibration,)
    callbacks = built.trainer.callbacks  # type: ignore[attr-defined]
    built.trainer.callbacks = [c for c in callbacks if isinstance(c, kept)]  # type: ignore[attr-defined]
    for callback in built.trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "output"):
            callback.output = str(folder)
    clocks = time.monotonic, time.process_time
    started = [clock() for clock in clocks]
    built.trainer.fit(built.model, datamodule=built.datamodule)
    seconds, processor = (clock() - start for clock, start in zip(clocks, started, strict=True))
    facts = read_json(folder / "adapter" / "adapter.json")
    held_out = folder / "heldout.json"
    chosen = read_json(held_out).get("selection", {}) if held_out.is_file() else {}
    calibrated = folder / "calibration.json"
    return {
        "adapter": {name: facts[name] for name in ("kind", "settings", "parameters", "share")},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(processor, 1),
        "chosen_step": chosen.get("chosen_step"),
        "scale": read_json(calibrated)["scale"] if calibrated.is_file() else 1.0,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format all finished rows, in their sections, as Markdown."""
    parts = []
    for title, names in SECTIONS.items():
        rows = [_cells(results[name]) for name in names if name in results]
        if rows:
            lines = [HEADER, ("---",) * len(HEADER), *rows]
            parts.append(f"### {title}")
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    if "oracle" in results or "oracle_minority" in results:
        parts.append(
            "Oracle environments are made of attribute labels. **No user has them**: the rows "
            "tell what better environments could still gain."
        )
    return "\n\n".join(parts) + "\n"


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    adapter = result.get("adapter")
    recall = result["recall"]
    return (
        result["says"],
        result["groups"],
        f"{adapter['parameters']:,}" if adapter else "",
        f"{100 * adapter['share']:.2f} %" if adapter else "",
        f"{result['seconds']:.0f}" if adapter else "",
        f"{result['scale']:.2f}" if adapter else "",
        f"{result['bias']:.3f} {interval_text(result['bias_interval'])}",
        f"{100 * result['prompt_accuracy']:.1f} %",
        f"{result['frechet_distance']:.1f}" if result["frechet_distance"] is not None else "–",
        f"{recall:.3f}" if recall is not None else "–",
    )


if __name__ == "__main__":
    sys.exit(main())
