"""Our measures against public implementations, and their speed and memory.

    python benchmarks/metrics.py agreement   a table: measure, reference, both values, difference
    python benchmarks/metrics.py speed       1024 images of 32 pixels, by part
    python benchmarks/metrics.py memory      peak memory with 1000 and with 10000 images

Networks that no package ships (InceptionV3, CLIP, DINOv2) have random weights of the real shape in
``speed``: what they cost does not depend on the values.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from metrics_agreement import agreement
from metrics_inputs import BATCH, PROMPTS, pictures, save_clip
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig

from invdiff_pl.metrics import FeatureExtractor, MaximumMeanDiscrepancy, build_extractor
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.metrics.clip import ClipEncoder
from invdiff_pl.metrics.sample_scores import SampleScores
from invdiff_pl.metrics.scorers import CMMD, FID, MAIN, Scorers
from invdiff_pl.utils.quiet import silence

CLASSES = ("land", "water")
EMBEDDING = 512  # of CLIP ViT-B/32


def print_agreement() -> None:
    """Print the table of differences."""
    print("| measure | reference | ours | theirs | relative difference |")
    print("| --- | --- | --- | --- | --- |")
    for measure, reference, ours, theirs in agreement():
        difference = abs(ours - theirs) / max(abs(theirs), 1e-12)
        print(f"| {measure} | {reference} | {ours:.8g} | {theirs:.8g} | {difference:.1e} |")


def stand_ins(side: int, clip: bool) -> Scorers:
    """Build all networks; those that no package ships get random weights of the real shape."""
    torch.manual_seed(0)
    facts = {"held_out_accuracy": {}, "held_out_confusion": {"attribute": [[90, 10], [10, 90]]}}
    scorers = Scorers(SampleClassifier(2, len(PROMPTS)).eval(), facts)
    scorers.extractors[MAIN] = build_extractor("efficientnet_lite0", input_size=side)
    if not clip:
        return scorers
    with tempfile.TemporaryDirectory() as name:
        scorers.clip = ClipEncoder(str(save_clip(CLIPConfig(), Path(name), 224)))  # ViT-B/32
    return scorers


def random_inception() -> FeatureExtractor:
    """Build the InceptionV3 extractor with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: PLC0415
        FeatureExtractorInceptionV3,
    )

    load = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({}, file.name)
        extractor = build_extractor("inception_v3", Path(file.name))
    FeatureExtractorInceptionV3.load_state_dict = load
    return extractor


def speed(count: int, inception: bool) -> None:
    """Print the seconds of each part, and of all."""
    scorers = stand_ins(96, clip=True)
    if inception:
        scorers.extractors[FID] = random_inception()
    scores = SampleScores(scorers, PROMPTS, CLASSES, 3, None, torch.device("cpu"))
    real, generated = pictures(count, 1), pictures(count, 2, top=220)
    prompts = torch.arange(count) % len(PROMPTS)
    seconds: dict[str, tuple[float, float]] = {}

    def timed(part: str, work: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        seconds[part] = (time.perf_counter() - wall, time.process_time() - cpu)

    def reference() -> None:
        for chunk in real.split(BATCH):
            for figure, extractor in scorers.extractors.items():
                scores.update_reference(figure, extractor(chunk))
            assert scorers.clip is not None
            scores.update_reference(CMMD, scorers.clip(chunk))

    def samples() -> None:
        for chunk, numbers in zip(generated.split(BATCH), prompts.split(BATCH), strict=True):
            scores.update(numbers, chunk)

    timed(f"features of {count} reference images (once; then on disk)", reference)
    timed(f"networks over {count} samples", samples)
    timed("every figure from sums and features", scores.figures)
    seconds["all"] = (sum(w for w, _ in seconds.values()), sum(c for _, c in seconds.values()))
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    print(f"| part, {threads} threads on {cores} cores | seconds | CPU seconds |")
    print("| --- | --- | --- |")
    for part, (wall, cpu) in seconds.items():
        print(f"| {part} | {wall:.1f} | {cpu:.1f} |")


def peak(count: int, parts: str) -> None:
    """Print the peak memory in MiB of scoring so many samples against 1000 reference images.

    CMMD gets made-up embeddings, since only what metrics keep is measured.
    """
    scorers = stand_ins(32, clip=False)
    scores = SampleScores(scorers, PROMPTS, CLASSES, 3, None, torch.device("cpu"))
    cmmd = MaximumMeanDiscrepancy(EMBEDDING)
    if parts == "sums":
        scores.manifold = None

    def embed(images: Tensor, real: bool) -> None:
        if parts == "all":
            random = torch.randn((len(images), EMBEDDING))
            cmmd.update(functional.normalize(random, dim=1), real=real)

    for start in range(0, 1000, 50):
        images = pictures(50, start)
        scores.update_reference(MAIN, scorers.extractors[MAIN](images))
        embed(images, real=True)
    for start in range(0, count, 50):
        images = pictures(min(50, count - start), 10**6 + start, top=220)
        scores.update(torch.arange(len(images)) % len(PROMPTS), images)
        embed(images, real=False)
    scores.figures()
    if parts == "all":
        cmmd.compute()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory(counts: list[int]) -> None:
    """Print the peak memory by number of images, each measured in its own process."""
    print("| what is kept | " + " | ".join(f"{n} images, MiB" for n in counts) + " |")
    print("| --- |" + " --- |" * len(counts))
    for parts, title in (
        ("sums", "sums: Bias, accuracy, Fréchet distance"),
        ("all", "sums and features: also precision, recall, density, coverage, CMMD"),
    ):
        found = []
        for count in counts:
            words = [sys.executable, __file__, "peak", "--count", str(count), "--parts", parts]
            output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            found.append(float(output.split()[-1]))
        print(f"| {title} | " + " | ".join(f"{value:.0f}" for value in found) + " |", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=["agreement", "speed", "memory", "peak"])
    parser.add_argument("--count", type=int, default=1024, help="images (speed, peak)")
    parser.add_argument("--inception", action="store_true", help="InceptionV3, too (speed)")
    parser.add_argument("--parts", choices=["sums", "all"], default="all", help="(peak)")
    options = parser.parse_args()
    silence()
    warnings.filterwarnings("ignore")
    if options.what == "agreement":
        print_agreement()
    elif options.what == "speed":
        speed(options.count, options.inception)
    elif options.what == "memory":
        memory([1000, 10_000])
    else:
        peak(options.count, options.parts)


if __name__ == "__main__":
    main()
