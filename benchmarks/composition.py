"""How much of a Fréchet distance is due to the shares of an attribute, how much to the pictures.

    python benchmarks/composition.py runs/celeba/mini

From a finished run's samples before and after, it draws subsets with equally many images of every
(prompt, attribute), and random ones of the same size, and prints their Fréchet distances to the
balanced reference. If the backbone's own balanced subsets are no nearer than its random ones, even
shares alone cannot lower the distance there: what remains is how well the rare pictures are drawn.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.callbacks import SampleEvaluation
from invdiff_pl.cli.lightning import build
from invdiff_pl.data.images import read_images, to_float
from invdiff_pl.data.samples import read_manifest
from invdiff_pl.metrics.frechet import frechet_distance
from invdiff_pl.metrics.reference import reference_rows
from invdiff_pl.metrics.scorers import MAIN, Scorers

BATCH = 256


@torch.inference_mode()
def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="finished run folder")
    parser.add_argument("--subsets", type=int, default=5, help="of each kind")
    options = parser.parse_args()
    samples = options.run_dir / "samples"
    built = build(["predict", f"--config={samples / 'config.yaml'}"])
    data, callbacks = built.datamodule, built.trainer.callbacks  # type: ignore[attr-defined]
    scoring = next(c for c in callbacks if isinstance(c, SampleEvaluation))
    scorers = Scorers.load(scoring.scoring, scoring.classifier_folder, data, few=True)
    extractor, test = scorers.extractors[MAIN], data.images("test")
    reference = torch.cat([extractor(test.gather(r)) for r in reference_rows(data).split(BATCH)])
    print("| samples | size | balanced subsets | random subsets |\n| --- | --- | --- | --- |")
    manifest = read_manifest(samples)
    for scale in sorted({sample.invariant_scale for sample in manifest}):
        rows = [sample for sample in manifest if sample.invariant_scale == scale]
        images = read_images([samples / row.file for row in rows], test.shape[-1])
        features = torch.cat([extractor(part) for part in images.split(BATCH)])
        read = [scorers.classifier(to_float(part))[0].argmax(1) for part in images.split(BATCH)]
        prompts = torch.tensor([data.prompts.index(row.prompt) for row in rows])
        cells = prompts * len(data.attribute_names) + torch.cat(read)
        size, table = subsets(cells, features, reference, options.subsets)
        told = " | ".join(f"{kind.mean():.1f} ± {kind.std():.1f}" for kind in table)
        print(f"| scale {scale:g} | {size} | {told} |", flush=True)


def subsets(cells: Tensor, features: Tensor, reference: Tensor, count: int) -> tuple[int, Tensor]:
    """Compute the distances of balanced and of random subsets.

    Args:
        cells: (prompt, attribute) of each image, int64 ``[N]``.
        features: ``[N, D]``.
        reference: ``[M, D]``.
        count: number of subsets of each kind.

    Returns:
        size of the subsets, and their distances, float64 ``[2, count]``.
    """
    sizes = cells.bincount()
    least = int(sizes[sizes > 0].min())
    source = generator(0, "subsets")
    distances = torch.zeros((2, count), dtype=torch.float64)
    for number in range(count):
        order = torch.randperm(len(cells), generator=source)
        balanced = torch.cat([order[cells[order] == cell][:least] for cell in range(len(sizes))])
        for kind, chosen in enumerate((balanced, order[: len(balanced)])):
            distances[kind, number] = _distance(features[chosen], reference)
    return least * int((sizes > 0).sum()), distances


def _distance(features: Tensor, reference: Tensor) -> float:
    first, second = features.double(), reference.double()
    return float(frechet_distance(first.mean(0), first.T.cov(), second.mean(0), second.T.cov()))


if __name__ == "__main__":
    main()
