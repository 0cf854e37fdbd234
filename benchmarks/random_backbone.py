"""A pipeline folder with Stable Diffusion 1.4's architecture and random weights, for rehearsals.

It draws noise, but takes as much memory, disk and time as the real one:

    python benchmarks/random_backbone.py /tmp/random-sd14
    make train EXP=waterbirds SCALE=sd14 BACKBONE=/tmp/random-sd14 DATA=/data/birds
"""

import argparse
from pathlib import Path

import torch

from invdiff_pl.backbones.pipeline import save_pipeline
from invdiff_pl.backbones.stable_diffusion import random_stable_diffusion
from invdiff_pl.utils.files import atomic_path


def main() -> None:
    """Write the folder in float16, which takes 2.1 GB at the published size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--thinner", type=int, default=1, help="divide the channels: 2, 5 or 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", nargs="+", default=["a photo of a landbird or a waterbird"])
    options = parser.parse_args()
    pipeline = random_stable_diffusion(options.prompts, options.seed, options.thinner)
    with atomic_path(options.folder) as partial:
        save_pipeline(pipeline.to(torch.float16), partial)


if __name__ == "__main__":
    main()
