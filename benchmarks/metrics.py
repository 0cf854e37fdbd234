"""Our measures against public implementations; their speed, and their memory.

    python benchmarks/metrics.py agreement   a table: measure, reference, both values, difference
    python benchmarks/metrics.py speed       1024 images of 32 pixels, by part
    python benchmarks/metrics.py memory      peak memory with 1000 and with 10000 images

Networks that no package carries (InceptionV3, CLIP, DINOv2) have random weights of the real shape
in ``speed``: what they cost does not depend on the values.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from cleanfid import fid as cleanfid
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch_fidelity import metric_kid, metric_prc
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from invdiff_pl.diffusion.pipeline import load_pipeline
from invdiff_pl.metrics import (
    BiasScore,
    Dinov2,
    FeatureExtractor,
    FrechetDistance,
    ManifoldScores,
    MaximumMeanDiscrepancy,
    build_extractor,
    proportion_interval,
    small_sample_bias,
)
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.metrics.clip import ClipEncoder, ClipScore
from invdiff_pl.metrics.sample_scores import SampleScores
from invdiff_pl.metrics.scorers import CMMD, FID, MAIN, Scorers
from invdiff_pl.quiet import silence

PROMPTS = ("a photo of a mallard", "a photo of a common raven")
CLASSES = ("land", "water")
BATCH = 128
EMBEDDING = 512  # of CLIP ViT-B/32
Row = tuple[str, str, float, float]


def pictures(count: int, seed: int, top: int = 256, side: int = 32) -> Tensor:
    """Random blobs, uint8 ``[N, 3, side, side]``: smooth, so that networks tell them apart."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 4, 4), generator=source) * top
    return functional.interpolate(coarse, side, mode="bicubic").clamp(0, 255).to(torch.uint8)


def agreement() -> list[Row]:
    """Measure, reference, our value, theirs."""
    real, generated = pictures(600, 1), pictures(500, 2, top=220)
    lite = build_extractor("efficientnet_lite0", input_size=64)
    features = [torch.cat([lite(part) for part in s.split(BATCH)]) for s in (real, generated)]
    narrow = [part[:, :64].contiguous() for part in features]
    return [
        *_distances(real, generated, lite, features, narrow),
        *_manifold(features),
        *_clip_and_dinov2(real, generated),
        *_bias(),
    ]


def _distances(
    real: Tensor,
    generated: Tensor,
    lite: FeatureExtractor,
    features: list[Tensor],
    narrow: list[Tensor],
) -> list[Row]:
    rows: list[Row] = []
    for name, (a, b) in (("64 features", narrow), ("1280 features", features)):
        metric = FrechetDistance(_Given(a.shape[1]))
        metric.update_features(a, real=True)
        metric.update_features(b, real=False)
        ours = float(metric.compute())
        moments = [m for x in (a, b) for m in _moments(x)]
        rows.append(
            (f"Fréchet, {name}", "clean-fid", ours, float(cleanfid.frechet_distance(*moments)))
        )
        theirs = FrechetInceptionDistance(feature=_flat(a.shape[1]), normalize=False)
        theirs.set_dtype(torch.float64)
        theirs.update(a, real=True)
        theirs.update(b, real=False)
        rows.append((f"Fréchet, {name}", "torchmetrics", ours, float(theirs.compute())))
    with tempfile.TemporaryDirectory() as folder:
        for name, images in (("a", real), ("b", generated)):
            (Path(folder) / name).mkdir()
            for number, image in enumerate(images):
                path = Path(folder) / name / f"{number}.png"
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        first_64 = lambda images: lite(images.round().to(torch.uint8))[:, :64]  # noqa: E731
        theirs_of_folders = cleanfid.compute_fid(
            f"{folder}/a",
            f"{folder}/b",
            custom_feat_extractor=first_64,
            custom_fn_resize=lambda image: image,
            use_dataparallel=False,
            num_workers=0,
            device=torch.device("cpu"),
            verbose=False,
        )
    rows.append(("Fréchet, folders of PNG", "clean-fid", rows[0][2], float(theirs_of_folders)))
    return rows


class _Given(FeatureExtractor):
    """Stands for an extractor whose features were taken already."""

    name = "given"

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _flat(num_features: int) -> torch.nn.Module:
    module = torch.nn.Identity()
    module.num_features = torch.tensor(num_features)
    return module


def _moments(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = features.double().numpy()
    return values.mean(0), np.cov(values, rowvar=False)


def _manifold(features: list[Tensor]) -> list[Row]:
    real, generated = features
    metric = ManifoldScores(real.shape[1])
    metric.update(real, real=True)
    metric.update(generated, real=False)
    ours = {name: float(value) for name, value in metric.compute().items()}
    precision, recall = metric_prc.calculate_precision_recall_full(
        generated.double(), real.double(), neighborhood=3
    )
    # Density and coverage by their definitions, on the whole distance matrices.
    radii = torch.cdist(real.double(), real.double()).kthvalue(4, dim=1).values
    inside = torch.cdist(generated.double(), real.double()) <= radii
    density = inside.double().sum(1).mean() / 3
    coverage = inside.any(0).double().mean()
    return [
        ("precision, k = 3", "torch-fidelity", ours["precision"], float(precision)),
        ("recall, k = 3", "torch-fidelity", ours["recall"], float(recall)),
        ("density, k = 3", "definition", ours["density"], float(density)),
        ("coverage, k = 3", "definition", ours["coverage"], float(coverage)),
    ]


def _clip_and_dinov2(real: Tensor, generated: Tensor) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        encoder = ClipEncoder(str(small_clip(Path(name))))
        prompts = torch.arange(len(generated)) % len(PROMPTS)
        score = ClipScore(encoder, PROMPTS)
        score.update(prompts, generated)
        model = CLIPModel.from_pretrained(name).eval()
        tokens = AutoTokenizer.from_pretrained(name)(
            list(PROMPTS), padding=True, return_tensors="pt"
        )
        pixels = CLIPImageProcessor.from_pretrained(name)(list(generated), return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens, **pixels).logits_per_image / model.logit_scale.exp()
        clip_t = 100 * logits[torch.arange(len(generated)), prompts].mean()
        sets = [encoder.encode_images(images)[:500] for images in (real, generated)]
    cmmd = MaximumMeanDiscrepancy(encoder.num_features)
    for images, is_real in zip(sets, (True, False), strict=True):
        cmmd.update(images, real=is_real)
    a, b = (images.double().numpy() for images in sets)
    kernels = [
        metric_kid.kernel_rbf(x, y, kid_kernel_rbf_sigma=10) for x, y in ((a, a), (a, b), (b, b))
    ]
    theirs = 1000 * metric_kid.mmd2(*kernels, mmd_est="biased")
    with tempfile.TemporaryDirectory() as name:
        dinov2 = Dinov2Model(_dinov2_config(32, 2)).eval()
        dinov2.save_pretrained(name)
        feature = Dinov2(Path(name), 28)(real[:8, :, :28, :28])
        deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        with torch.no_grad():
            pixels = (real[:8, :, :28, :28] / 255 - mean) / deviation
            token = dinov2(pixel_values=pixels).last_hidden_state[:, 0]
    return [
        ("CLIP-T", "transformers", float(score.compute()["mean"]), float(clip_t)),
        ("CMMD", "torch-fidelity", float(cmmd.compute()), float(theirs)),
        ("DINOv2 feature, norm", "transformers", float(feature.norm()), float(token.norm())),
    ]


def small_clip(folder: Path) -> Path:
    """A CLIP model folder with random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, "num_attention_heads": 2, "vocab_size": 1024, "eos_token_id": 1},
        vision_config={**sizes, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return _save_clip(config, folder, 32)


def _save_clip(config: CLIPConfig, folder: Path, side: int) -> Path:
    CLIPModel(config).save_pretrained(folder)
    load_pipeline("asset:waterbirds").tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def _dinov2_config(width: int, layers: int) -> Dinov2Config:
    return Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, image_size=28
    )


def _bias() -> list[Row]:
    counts = torch.tensor([[60, 25, 10, 5], [30, 30, 20, 20]])
    target = torch.tensor([0.4, 0.3, 0.2, 0.1])
    score = BiasScore(2, 4, target=target)
    cells = torch.repeat_interleave(torch.arange(8), counts.flatten())
    score.update(cells // 4, cells % 4)
    found = score.compute()
    shares = (counts / counts.sum(1, keepdim=True)).double().numpy()
    pairs = [np.abs(row[:, None] - row).sum() / (4 * 3) for row in shares]
    kl = scipy.stats.entropy(shares[0], target.double().numpy())
    wilson = scipy.stats.binomtest(60, 100).proportion_ci(method="wilson")
    draws = np.random.default_rng(0).multinomial(128, [0.25] * 4, 200_000) / 128
    ranks = np.sort(draws, axis=1) @ np.array([-3, -1, 1, 3]) * 2 / 12
    n = torch.tensor(128)
    return [
        ("Bias, K = 4", "sum over pairs", float(found["mean"]), float(np.mean(pairs))),
        ("KL divergence to a target", "SciPy", float(found["kl"][0]), float(kl)),
        ("Wilson interval, lower end", "SciPy", proportion_interval(60, 100)[0], float(wilson.low)),
        (
            "Bias of a balanced sampler",
            "simulation",
            float(small_sample_bias(n, 4)),
            float(ranks.mean()),
        ),
    ]


def print_agreement() -> None:
    """The table of differences."""
    print("| measure | reference | ours | theirs | relative difference |")
    print("| --- | --- | --- | --- | --- |")
    for measure, reference, ours, theirs in agreement():
        difference = abs(ours - theirs) / max(abs(theirs), 1e-12)
        print(f"| {measure} | {reference} | {ours:.8g} | {theirs:.8g} | {difference:.1e} |")


def stand_ins(side: int, clip: bool) -> Scorers:
    """All networks, those that no package carries with random weights of the real shape."""
    torch.manual_seed(0)
    facts = {"held_out_accuracy": {}, "held_out_confusion": {"attribute": [[90, 10], [10, 90]]}}
    scorers = Scorers(SampleClassifier(2, len(PROMPTS)).eval(), facts)
    scorers.extractors[MAIN] = build_extractor("efficientnet_lite0", input_size=side)
    if not clip:
        return scorers
    with tempfile.TemporaryDirectory() as name:
        scorers.clip = ClipEncoder(str(_save_clip(CLIPConfig(), Path(name), 224)))  # ViT-B/32
    return scorers


def random_inception() -> FeatureExtractor:
    """The InceptionV3 extractor with random weights."""
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
    """Seconds by part, and of all."""
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
    print(f"| part, {torch.get_num_threads()} threads | seconds | CPU seconds |")
    print("| --- | --- | --- |")
    for part, (wall, cpu) in seconds.items():
        print(f"| {part} | {wall:.1f} | {cpu:.1f} |")


def peak(count: int, parts: str) -> None:
    """Print the peak memory in MiB of scoring so many samples against 1000 reference images.

    CMMD is fed with embeddings out of thin air: what is measured is what metrics keep.
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
    """Peak memory by number of images, each in a process of its own."""
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
