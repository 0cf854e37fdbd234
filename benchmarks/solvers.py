"""How many steps of which solver draw as well as the reference's 50 steps of PNDM.

    python benchmarks/solvers.py
    python benchmarks/solvers.py --images 600 --seeds 0 1 2 3 4

Every row starts from the same noise for each seed, with the shipped Waterbirds backbone. The
Fréchet distance is to drawn training pictures, on ImageNet features, with mean and standard
deviation over seeds: differences below the latter are noise. All sets have the same size, on which
the distance depends.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import (
    load_pipeline,
    sample_images,
    set_scheduler,
)
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.images import read_images
from invdiff_pl.data.synthetic.waterbirds import RenderedWaterbirds, render_waterbirds
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.metrics import FeatureExtractor, FrechetDistance, build_extractor
from invdiff_pl.utils.files import write_json
from invdiff_pl.utils.quiet import silence

BACKBONE = "asset:waterbirds"
BATCH = 64
# Solver and steps; the others are compared with the first row.
ROWS = (
    ("PNDMScheduler", 50),
    ("DDIMScheduler", 50),
    ("DDIMScheduler", 20),
    ("DPMSolverMultistepScheduler", 20),
    ("UniPCMultistepScheduler", 20),
    ("DPMSolverMultistepScheduler", 12),
)


def training_pictures(folder: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Draw training pictures of the backbone's data set, uint8; return their prompts, too."""
    render_waterbirds(folder, RenderedWaterbirds(fraction=0.1), progress=False)
    data = WaterbirdsDataModule(
        root=str(folder), backbone=BACKBONE, resolution=32, prompt_by="species"
    )
    index = data.index
    return read_images(index.paths(index.rows("train")), 32), index.prompts


def distance(extractor: FeatureExtractor, real: Tensor, generated: Tensor) -> float:
    """Compute the Fréchet distance between two sets of images."""
    metric = FrechetDistance(extractor)
    for images, is_real in ((real, True), (generated, False)):
        for chunk in images.split(BATCH):
            metric.update_features(extractor(chunk), real=is_real)
    return float(metric.compute())


def draw(solver: str, steps: int, prompts: tuple[str, ...], count: int, seed: int) -> Tensor:
    """Draw ``count`` images, dealt over the prompts, uint8."""
    pipeline = load_pipeline(BACKBONE)
    set_scheduler(pipeline, solver)
    conditions = Conditions(frozen_denoiser(pipeline).condition([*prompts, ""]))
    drawn = [
        sample_images(
            pipeline,
            conditions[chunk % len(prompts)],
            conditions.null,
            chunk.tolist(),
            seed=seed,
            steps=steps,
            guidance_scale=1.0,
        )
        for chunk in torch.arange(count).split(BATCH)
    ]
    return torch.cat(drawn)


def _row(text: str) -> tuple[str, int]:
    solver, _, steps = text.partition(":")
    return solver, int(steps)


def main() -> None:
    """Measure row by row, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, type=_row, metavar="SOLVER:STEPS", help="all otherwise"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/solvers.json"))
    options = parser.parse_args()
    silence()
    extractor = build_extractor("efficientnet_lite0", input_size=96)
    with tempfile.TemporaryDirectory() as folder:
        real, prompts = training_pictures(Path(folder) / "images")
    rows = []
    print(f"{options.images} images a seed, {len(options.seeds)} seeds\n")
    print("| solver | steps | Fréchet distance | CPU ms an image |\n| --- | --- | --- | --- |")
    for solver, steps in options.rows:
        started = time.process_time()
        sets = [draw(solver, steps, prompts, options.images, seed) for seed in options.seeds]
        milliseconds = 1e3 * (time.process_time() - started) / len(sets) / options.images
        found = torch.tensor([distance(extractor, real, images) for images in sets])
        spread = float(found.std()) if len(sets) > 1 else 0.0
        rows.append({"solver": solver, "steps": steps, "distances": found.tolist()})
        rows[-1]["cpu_ms_per_image"] = milliseconds
        cells = (solver, f"{steps}", f"{found.mean():.1f} ± {spread:.1f}", f"{milliseconds:.0f}")
        print("| " + " | ".join(cells) + " |", flush=True)
    write_json(options.output, {"images": options.images, "seeds": options.seeds, "rows": rows})


if __name__ == "__main__":
    main()
