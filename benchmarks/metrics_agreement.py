"""Our measures and public implementations on the same input."""

import tempfile
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from cleanfid import fid as cleanfid
from metrics_inputs import BATCH, PROMPTS, pictures, small_clip
from PIL import Image
from torch import Tensor
from torch_fidelity import metric_kid, metric_prc
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

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
from invdiff_pl.metrics.clip import ClipEncoder, ClipScore

Row = tuple[str, str, float, float]


def agreement() -> list[Row]:
    """Return rows of measure, reference, our value and theirs."""
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
    """A stand-in for an extractor whose features were taken already."""

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
    # Density and coverage by their definitions, from the whole distance matrices.
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
