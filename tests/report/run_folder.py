"""A run folder made by hand."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from invdiff_pl.data.samples import Sample, manifest_text, sample_file

PROMPTS = ("a photo of a raven", "a | strange <prompt>")


def _bias(mean: float) -> dict:
    entry = {
        "bias": mean,
        "interval": [mean - 0.05, mean + 0.05],
        "counts": {"land": 60, "water": 4},
        "total_variation": mean / 2,
        "kl": mean / 3,
        "corrected": mean - 0.01,
        "balanced_sampler_would_show": 0.1,
    }
    per_prompt = dict.fromkeys(PROMPTS, entry)
    interval = [mean - 0.04, mean + 0.04]
    return {
        "mean": mean,
        "std": 0.0,
        "interval": interval,
        "corrected_mean": mean - 0.01,
        "target": "even",
        "per_prompt": per_prompt,
    }


def scale_figures(bias: float, accuracy: float, distance: float) -> dict:
    """What the samples stage measures at one scale."""
    return {
        "bias": _bias(bias),
        "prompt_accuracy": {"mean": accuracy, "interval": [accuracy - 0.01, 1.0]},
        "frechet_distance": distance,
        "distances": {"fid": {"reason": "no weights"}, "cmmd": distance / 100},
        "manifold": {"precision": 0.7, "recall": bias, "density": 0.6, "coverage": 0.5},
        "clip_t": {"reason": "no CLIP model"},
    }


CANDIDATE = {
    "verdict": "bias",
    "reason": "shares differ by 0.8.",
    "groups": 2,
    "names": [],
    "evidence": 0.4,
    "gain": 0.3,
    "alignment": 0.95,
    "p_value": 0.05,
    "shares": [[0.9, 0.1], [0.1, 0.9]],
    "intervals": [[[0.8, 0.95], [0.05, 0.2]], [[0.05, 0.2], [0.8, 0.95]]],
}
METRICS: dict = {
    "scales": {"0.0": scale_figures(0.94, 0.99, 450.0), "1.0": scale_figures(0.08, 0.98, 420.0)},
    "data": {"bias": _bias(0.9)},
    "samples_per_prompt": 2,
    "classifier": {"attribute": 1.0, "prompt": 0.99},
    "frechet_distance": {
        "backend": "torchmetrics",
        "extractor": "efficientnet_lite0",
        "resize": 96,
        "reference": "test split",
        "reference_images": 12,
        "n": 4,
    },
    "distances": {
        "cmmd": {"backend": "invdiff-pl", "extractor": "clip", "n": 4, "reference_images": 12}
    },
    "manifold": {"neighbours": 3},
    "attribute": "background",
}


def write_run(folder: Path) -> None:
    """Write the folder of a run that has everything but a report."""

    def write(name: str, value: dict) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    write("samples/metrics.json", METRICS)
    settings = {"experiment": {"name": "waterbirds", "scale": "mini"}}
    write("samples/stage.json", {"seconds": 12.0, "config": settings})
    write("adapter/stage.json", {"seconds": 30.5})
    adapter = {"kind": "lora", "settings": {"rank": 2}, "parameters": 1000, "share": 0.03}
    write("adapter/adapter/adapter.json", adapter)
    environments = {
        "groups": 2,
        "features": "block",
        "prompts": list(PROMPTS),
        "verdict": "bias",
        "bias_found": True,
        "reason": "shares differ by 0.8.",
        "candidate": 0,
        "candidates": [CANDIDATE],
        "quality": {"auc": 0.9876, "per_prompt": [{"sizes": [90, 5], "confidence": 0.9}] * 2},
    }
    write("environments/environments.json", environments)
    scores = np.concatenate([np.zeros(90), np.ones(10)]) + np.linspace(0, 0.1, 100)
    tensors = {"scores": scores, "assignments": (scores > 0.5).astype(np.int64)}
    save_file(tensors, folder / "environments" / "environments.safetensors")
    samples = []
    for scale, grey in ((0.0, 10), (1.0, 200)):
        for index in range(4):
            file = sample_file(scale, index)
            (folder / "samples" / file).parent.mkdir(exist_ok=True)
            pixels = np.full((32, 32, 3), grey + index, np.uint8)
            Image.fromarray(pixels).save(folder / "samples" / file)
            prompt = PROMPTS[index // 2]
            samples.append(Sample(str(file), index, prompt, index // 2, scale, 0, 1.0, 2, "DDIM"))
    (folder / "samples" / "manifest.jsonl").write_text(manifest_text(samples))
