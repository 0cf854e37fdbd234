"""Every stage in the reference's recipe against ours, interleaved, in one run on one machine.

    python benchmarks/bench.py
    python benchmarks/bench.py --stages scoring adapter --rounds 9 --clock cpu
    python benchmarks/bench.py --device cuda        the SD-1.4 architecture, random weights

The reference's recipe is written from its description (docs/method.md), not copied. Both sides work
on the same pictures with the same batch size and adapter. Ratios are medians over rounds, with the
lowest and the highest. Results go to benchmarks/results/MACHINE.json, too.

MFU is the rate of the operations that a unit of work needs (matrix products, convolutions and
attention of the denoiser, forward, and backward in training), relative to that of a square matrix
product in the same precision, measured in the same run.
"""

import argparse
import contextlib
import gc
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_environments import Features, Scoring
from bench_ladder import rungs
from bench_measure import CLOCKS, interleaved, peak_flops, peak_mib, peak_of_child
from bench_recipes import prepare
from bench_stages import COMPILED, HALVES, STAGES, Evaluation, Sampling, Training
from bench_whole import whole_run
from bench_work import SD14, SMALL, THIN, ReferenceInputs, Work, write_sd_backbone

from invdiff_pl.utils.files import write_json
from invdiff_pl.utils.quiet import silence

HEADER = (
    "stage",
    "reference, /s",
    "ours, /s",
    "ratio",
    "peak MiB, reference",
    "ours",
    "MFU, reference",
    "ours",
    "loader wait, reference",
    "ours",
    "parity",
)
MEASURED_PEAKS: dict[str, Any] = {
    "scoring": Scoring,
    "features": Features,
    "adapter": lambda work: Training(work, "lora"),
    "sampling": lambda work: Sampling(work, ours=work.batch),
    "evaluation": Evaluation,
}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    device: torch.device
    backbone: str
    images: int
    batch: int
    rounds: int
    clock: str
    memory: tuple[str, ...]
    memory_images: int
    compiled: bool


def measure(name: str, half: bool, work: Work, settings: Settings) -> dict[str, Any]:
    """Measure one stage: speeds, ratio, MFU, waits, parity."""
    stage = STAGES[name](work, half)
    clock, device = CLOCKS[settings.clock], settings.device
    stage.waits.update(dict.fromkeys(stage.waits, 0.0))
    found = interleaved(stage.reference, stage.ours, settings.rounds, clock, device)
    theirs, ours = stage.counts
    low, ratio, high = found.ratios(ours / theirs)
    how = ["in bf16"] * half + ["compiled"] * (work.compiled and name in COMPILED)
    middle = [sorted(seconds)[len(seconds) // 2] for seconds in (found.first, found.second)]
    result: dict[str, Any] = {
        "stage": ", ours ".join([stage.name, *how]),
        "unit": stage.unit,
        "reference_per_s": theirs / middle[0],
        "ours_per_s": ours / middle[1],
        "ratio": ratio,
        "ratio_range": [low, high],
        # Seconds per unit, round by round.
        "reference_seconds": [each / theirs for each in found.first],
        "ours_seconds": [each / ours for each in found.second],
        "reference_peak_mib": None,
        "ours_peak_mib": None,
        "parity": stage.parity,
    }
    if stage.required:
        fastest = [
            peak_flops(dtype, clock, device)
            for dtype in (torch.float32, torch.bfloat16 if half else torch.float32)
        ]
        for side, peak in zip(("reference", "ours"), fastest, strict=True):
            result[f"{side}_mfu"] = result[f"{side}_per_s"] * stage.required / peak
    if stage.waits:
        # Waits include the warm-up round.
        rounds = settings.rounds + 1
        for side, seconds in zip(("reference", "ours"), middle, strict=True):
            result[f"{side}_loader_wait"] = stage.waits[side] / rounds / seconds
    return result


def peak_child(side: str, name: str, settings: Settings) -> None:
    """Run one round of one side of a stage in this process, and print its peak memory last."""
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(Path(folder), settings)
        prepare(work, ReferenceInputs(work), work.folder / "latents")
        recipe = MEASURED_PEAKS[name](work)
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        getattr(recipe, side)()
        print(f"\n{peak_mib(settings.device):.1f}")


def peaks(name: str, settings: Settings, images: int) -> dict[str, float]:
    """Measure the peak memory of both sides of a stage, each in its own process."""
    found = {}
    for side in ("reference", "ours"):
        arguments = ["--peak-of", f"{side}:{name}", "--backbone", settings.backbone]
        arguments += ["--device", settings.device.type, "--images", f"{images}"]
        arguments += ["--batch", f"{settings.batch}"]
        found[side] = peak_of_child(__file__, arguments)
    return found


def make_work(folder: Path, settings: Settings) -> Work:
    """Make the pictures that the benchmark works on."""
    return Work.make(
        folder,
        settings.backbone,
        settings.images,
        batch=settings.batch,
        device=settings.device,
        clock=CLOCKS[settings.clock],
        compiled=settings.compiled,
    )


def table(results: list[dict[str, Any]]) -> str:
    """Format results as Markdown."""
    lines = [HEADER, ("---",) * len(HEADER), *map(_cells, results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    low, high = result["ratio_range"]

    def share(name: str) -> str:
        return f"{100 * result[name]:.1f} %" if name in result else "–"

    def memory(side: str) -> str:
        peak = result[f"{side}_peak_mib"]
        return "–" if peak is None else f"{peak:.0f}"

    return (
        f"{result['stage']}, {result['unit']}",
        f"{result['reference_per_s']:.3g}",
        f"{result['ours_per_s']:.3g}",
        f"**{_ratio(result['ratio'])}** [{_ratio(low)}, {_ratio(high)}]",
        memory("reference"),
        memory("ours"),
        share("reference_mfu"),
        share("ours_mfu"),
        share("reference_loader_wait"),
        share("ours_loader_wait"),
        result["parity"],
    )


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def ladder(
    work: Work, settings: Settings, compiled: bool, wanted: str = ""
) -> list[dict[str, Any]]:
    """Measure the ratio of each measure alone, and print it at once."""
    print("\n| stage | measure | ratio |\n| --- | --- | --- |")
    results = []
    for rung in rungs(work, compiled):
        if wanted not in f"{rung.stage}: {rung.measure}":
            continue
        pair = rung.without, rung.with_it
        found = interleaved(*pair, settings.rounds, CLOCKS[settings.clock], settings.device)
        low, ratio, high = found.ratios(rung.work)
        results.append({"stage": rung.stage, "measure": rung.measure, "ratio": ratio})
        results[-1]["ratio_range"] = [low, high]
        print(
            f"| {rung.stage} | {rung.measure} | {ratio:.2f} [{low:.2f}, {high:.2f}] |", flush=True
        )
    return results


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--architecture",
        choices=["small", "sd14", "thin"],
        help="small, the shipped Waterbirds backbone; sd14, random weights; thin, the same in "
        "small; sd14 on a GPU and small on a CPU otherwise",
    )
    parser.add_argument("--backbone", help="a pipeline folder instead")
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="of training and scoring")
    parser.add_argument("--rounds", type=int, default=5, help="measured; one more warms up")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu where others use the machine"
    )
    parser.add_argument("--no-ladder", action="store_true")
    parser.add_argument(
        "--rungs", default="", metavar="TEXT", help="of the ladder only those that TEXT is part of"
    )
    parser.add_argument(
        "--memory",
        nargs="*",
        choices=list(MEASURED_PEAKS),
        default=list(MEASURED_PEAKS),
        help="stages whose peaks are measured, in processes of their own",
    )
    parser.add_argument(
        "--memory-images", type=int, default=512, help="N; scoring is measured with 4 N, too"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile for ours, and in the ladder"
    )
    parser.add_argument("--output", type=Path, help="benchmarks/results/MACHINE.json otherwise")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, print and write the results."""
    options = parse()
    silence()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: --device=cuda: there is no GPU here.", file=sys.stderr)
        return 2
    architecture = options.architecture or ("sd14" if device.type == "cuda" else "small")
    with tempfile.TemporaryDirectory() as folder:
        backbone = options.backbone or SMALL
        if architecture != "small" and not options.backbone:
            backbone = str(Path(folder) / "backbone")
            write_sd_backbone(Path(backbone), SD14 if architecture == "sd14" else THIN)
        settings = Settings(
            device,
            backbone,
            options.images,
            options.batch,
            options.rounds,
            options.clock,
            tuple(options.memory),
            options.memory_images,
            options.compile,
        )
        if options.peak_of:
            peak_child(*options.peak_of.split(":"), settings)
            return 0
        report = run(Path(folder), options, settings, architecture)
    output = options.output or Path("benchmarks/results") / f"{platform.node()}.json"
    write_json(output, report)
    print(f"\nwritten to {output}")
    return 0


def run(
    folder: Path, options: argparse.Namespace, settings: Settings, architecture: str
) -> dict[str, Any]:
    """Run all that was asked for."""
    machine = hardware(settings.device)
    print(
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {architecture}, "
        f"{settings.images} images, batch {settings.batch}, {settings.rounds} rounds, "
        f"{settings.clock} time\n"
    )
    work = make_work(folder, settings)
    results = []
    for name in options.stages:
        for half in (False, True)[: 1 + (name in HALVES)]:
            results.append(measure(name, half, work, settings))
            print(
                f"{results[-1]['stage']}: {results[-1]['ratio']:.2f}", file=sys.stderr, flush=True
            )
            if not half and name in settings.memory:
                for side, peak in peaks(name, settings, settings.memory_images).items():
                    results[-1][f"{side}_peak_mib"] = peak
    if whole := whole_run(results):
        results.append(whole)
    if results:
        print(table(results), flush=True)
    flat: dict[str, dict[str, float]] = {}
    scored = [result for result in results if result["stage"] == "scoring"]
    if scored and "scoring" in settings.memory:
        sides, few = ("reference", "ours"), settings.memory_images
        flat[f"{few}"] = {side: scored[0][f"{side}_peak_mib"] for side in sides}
        flat[f"{4 * few}"] = peaks("scoring", settings, 4 * few)
        print("\n| images scored | peak MiB, reference | ours |\n| --- | --- | --- |")
        for count, found in flat.items():
            print(f"| {count} | {found['reference']:.0f} | {found['ours']:.0f} |")
    ladders = (work, settings, options.compile, options.rungs)
    rows = [] if options.no_ladder else ladder(*ladders)
    facts = {"machine": machine, "threads": torch.get_num_threads(), "clock": settings.clock}
    return {**facts, "stages": results, "scoring_memory": flat, "ladder": rows}


def hardware(device: torch.device) -> str:
    """Return the name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
