"""Peers in one harness: the same backbone, noise and classifier, one table.

    python benchmarks/peers.py runs/waterbirds/mini --prompts-run runs/prompts/mini
    python benchmarks/peers.py runs/waterbirds/mini --rows nothing clusters_0.2 ours

Every method gets a finished run's backbone and starts from the same noise as the run's samples; the
run's classifier reads what it draws. Methods are written from their descriptions. Rows are kept in
RUN/peers/rows: the same command goes on where it was stopped, and redoes rows whose inputs changed.
The table goes to RUN/peers/peers.md and .json.

Rows with labels bound what can be achieved; users of the other methods have no labels.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from ablation import add_rows, run_rows
from bench_measure import interleaved
from peers_harness import Harness, NotRun
from peers_rows import PEERS, Made, Peer, nothing

from invdiff_pl.cli.sweep import score_samples
from invdiff_pl.data.samples import sample_file
from invdiff_pl.report.figures import estimate_text, interval_text
from invdiff_pl.utils.files import digest_json, read_json, write_json, write_text
from invdiff_pl.utils.images import ImageWriter
from invdiff_pl.utils.progress import track

# Number of images drawn to time a method against the backbone, and of rounds.
TIMED, ROUNDS = 8, 3
HEADER = (
    "method",
    "needs",
    "parameters",
    "training, s",
    "cost of a sample",
    "Bias",
    "prompt accuracy",
    "Fréchet distance",
)


def main() -> int:
    """Run the missing rows, and print the table."""
    return run_rows(_run, _parser().parse_args())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="finished run on a data set with labels")
    parser.add_argument(
        "--prompts-run", type=Path, help="finished run from prompts alone, on the same backbone"
    )
    add_rows(parser, list(PEERS))
    parser.add_argument("--samples-per-prompt", type=int, help="the run's otherwise")
    parser.add_argument(
        "--pilot", type=int, default=256, help="samples of each prompt that clusters are found in"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps; the run's otherwise")
    parser.add_argument(
        "--words",
        nargs="+",
        metavar="WORDS",
        help="put after prompts to rewrite them; the names of the attribute's classes otherwise",
    )
    parser.add_argument("--output", type=Path, help="RUN/peers otherwise")
    return parser


def _run(options: argparse.Namespace) -> None:
    output: Path = options.output or options.run_dir / "peers"
    harness = Harness(
        options.run_dir,
        options.prompts_run,
        output,
        samples_per_prompt=options.samples_per_prompt,
        pilot=options.pilot,
        steps=options.steps,
        words=options.words,
    )
    for name in options.rows:
        run_row(PEERS[name], harness)
    done = {name: output / "rows" / f"{name}.json" for name in PEERS}
    results = {name: read_json(path) for name, path in done.items() if path.is_file()}
    write_json(output / "peers.json", results)
    write_text(output / "peers.md", table(results))
    print(table(results))


def run_row(peer: Peer, harness: Harness) -> None:
    """Make, draw and score one row, unless it is on record."""
    record = harness.output / "rows" / f"{peer.name}.json"
    key = digest_json({"row": peer.name, **harness.identity()})
    if record.is_file() and read_json(record)["key"] == key:
        print(f"{peer.name}: up to date", flush=True)
        return
    print(f"{peer.name}: {peer.says}", flush=True)
    told: dict[str, Any] = {"key": key, "row": peer.name, "says": peer.says, "needs": peer.needs}
    folder = harness.output / "work" / f"{peer.name}-{key[:8]}"
    try:
        made = peer.make(harness, folder)
    except NotRun as reason:
        write_json(record, {**told, "reason": str(reason)})
        return
    _draw(peer.name, made, harness, folder / "samples")
    flags = [
        "--model.invariant_scales=[0.0]",
        "--model.adapter=null",
        f"--data.samples_per_prompt={harness.per_prompt}",
    ]
    figures = score_samples(harness.predict, folder / "samples", flags)["scales"]["0.0"]
    measures = ("bias", "prompt_accuracy", "frechet_distance", "manifold")
    scores = {name: figures[name] for name in measures}
    write_json(record, {**told, **made.facts, "cost": _cost(made, harness), **scores})


def _draw(name: str, made: Made, harness: Harness, folder: Path) -> None:
    """Write the missing samples, in the samples stage's layout."""
    writer = ImageWriter()
    batches = torch.arange(harness.count).split(harness.data.batch_size)
    for indices in track(batches, name, unit="batch", bar=False):
        files = [folder / sample_file(0.0, index) for index in indices.tolist()]
        if all(file.is_file() for file in files):
            continue
        for file, image in zip(files, made.images(indices), strict=True):
            writer.write(file, image)
    writer.close()


def _cost(made: Made, harness: Harness) -> float:
    """Measure the time per sample, as a multiple of the backbone's."""
    if made.stock:
        return 1.0
    stock = nothing(harness, harness.output)
    indices = torch.arange(min(TIMED, harness.count))
    compared = interleaved(
        lambda: made.images(indices),
        lambda: stock.images(indices),
        ROUNDS,
        harness.clock,
        harness.device,
    )
    return round(compared.ratios()[1], 2)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format all finished rows as Markdown, with those that could not be run listed below."""
    lines = [HEADER, ("---",) * len(HEADER)]
    lines += [_cells(result) for result in results.values()]
    parts = ["\n".join("| " + " | ".join(line) + " |" for line in lines)]
    parts += [
        f"Not run: {result['says']} ({result['reason']})."
        for result in results.values()
        if "reason" in result
    ]
    return "\n\n".join(parts) + "\n"


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    first = result["says"], result["needs"]
    if "reason" in result:
        return (*first, *("–",) * (len(HEADER) - 2))
    accuracy = result["prompt_accuracy"]
    distance = result["frechet_distance"]
    return (
        *first,
        f"{result['parameters']:,}" if "parameters" in result else "–",
        _seconds(result),
        f"{result['cost']:.2f}",
        estimate_text(result["bias"]),
        f"{100 * accuracy['mean']:.1f} % {interval_text(accuracy['interval'], 100, 1)}",
        f"{distance:.1f}" if isinstance(distance, float) else "–",
    )


def _seconds(result: dict[str, Any]) -> str:
    """Format seconds: processor time if trained here, wall time if trained by the run."""
    if "wall_seconds" in result:
        return f"{result['wall_seconds']:.0f} (wall)"
    return f"{result['seconds']:.0f}" if "seconds" in result else "–"


if __name__ == "__main__":
    sys.exit(main())
