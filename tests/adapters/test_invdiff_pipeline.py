"""The pipeline to take away: stock behaviour, an invariant scale, round trips, and the export."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_cases import disturb
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from invdiff_pl import InvDiffPipeline
from invdiff_pl.adapters import build_adapter
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.cli.main import main
from invdiff_pl.utils.errors import InvDiffError

PROMPT = "a photo of a mallard"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "small_unet": {"ratio": 0.5},
    "bottleneck": {"ratio": 0.2},
    "unet_copy": {},
}


def _run_folder(folder: Path, backbone: Path, kind: str) -> Path:
    """A run folder with an adapter whose weights have been moved."""
    adapter = build_adapter(kind, load_pipeline(str(backbone)).unet, **KINDS[kind])
    disturb(adapter)
    (folder / "adapter" / "adapter").mkdir(parents=True)
    adapter.save(folder / "adapter" / "adapter", backbone_size=92372, trained=True)
    config = {
        "experiment": {"name": "waterbirds"},
        "seed_everything": 0,
        "trainer": {"max_steps": 10},
        "model": {"init_args": {"backbone": str(backbone), "lambda_": 1.0}},
        "data": {"init_args": {"resolution": 32, "batch_size": 48}},
    }
    record = {"config": config, "revision": "abc", "hardware": "2 cores"}
    (folder / "adapter" / "stage.json").write_text(json.dumps(record))
    environments = {"prompts": [PROMPT], "images": 9, "groups": 2, "score": "refined_contrast"}
    (folder / "environments").mkdir()
    (folder / "environments" / "environments.json").write_text(json.dumps(environments))
    return folder


def _draw(pipeline: StableDiffusionPipeline, **settings: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray = pipeline(
        PROMPT,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **settings,
    ).images
    return images


def _stock(backbone: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)


@pytest.mark.parametrize("kind", list(KINDS))
def test_scale_zero_is_the_stock_pipeline_and_folders_round_trip_bit_for_bit(
    kind, tiny_backbone, tmp_path
) -> None:
    run = _run_folder(tmp_path / "run", tiny_backbone, kind)
    pipeline = InvDiffPipeline.from_pretrained(run)
    after = _draw(pipeline)
    before = _draw(_stock(tiny_backbone))
    assert not np.array_equal(after, before)
    assert np.array_equal(_draw(pipeline, invariant_scale=0.0), before)
    assert np.array_equal(_draw(pipeline), after)

    pipeline.save_pretrained(tmp_path / "saved")
    assert np.array_equal(_draw(InvDiffPipeline.from_pretrained(tmp_path / "saved")), after)
    assert main(["export", "--run-dir", str(run), "--output", str(tmp_path / "exported")]) == 0
    assert np.array_equal(_draw(InvDiffPipeline.from_pretrained(tmp_path / "exported")), after)
    for folder in ("saved", "exported"):
        assert np.array_equal(_draw(_stock(tmp_path / folder)), before)


def test_a_stock_pipeline_takes_an_exported_lora_adapter(tiny_backbone, tmp_path) -> None:
    run = _run_folder(tmp_path / "run", tiny_backbone, "lora")
    main(["export", "--run-dir", str(run), "--output", str(tmp_path / "exported")])
    stock = _stock(tmp_path / "exported")
    stock.load_lora_weights(tmp_path / "exported" / "adapter")
    ours = _draw(InvDiffPipeline.from_pretrained(tmp_path / "exported"))
    np.testing.assert_allclose(_draw(stock), ours, atol=2e-3)


def test_schedulers_callbacks_and_dtypes_are_as_in_diffusers(tiny_backbone, tmp_path) -> None:
    run = _run_folder(tmp_path / "run", tiny_backbone, "small_unet")
    pipeline = InvDiffPipeline.from_pretrained(run)
    seen = []

    def watch(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, sorted(tensors)))
        return tensors

    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, final_sigmas_type="sigma_min"
    )
    images = _draw(pipeline, callback_on_step_end=watch)
    assert seen == [(step, ["latents"]) for step in range(3)]
    assert np.isfinite(images).all()
    pipeline.save_pretrained(tmp_path / "saved")
    again = InvDiffPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(again.scheduler, DPMSolverMultistepScheduler)
    reduced = InvDiffPipeline.from_pretrained(run, dtype=torch.bfloat16)
    assert reduced.unet.dtype == torch.bfloat16
    assert next(iter(reduced.adapter.parameters().values())).dtype == torch.bfloat16
    assert np.isfinite(_draw(reduced)).all()


def test_the_card_tells_training_and_limits_and_admits_what_was_not_measured(
    tiny_backbone, tmp_path
) -> None:
    run = _run_folder(tmp_path / "run", tiny_backbone, "lora")
    main(["export", "--run-dir", str(run), "--output", str(tmp_path / "exported")])
    text = (tmp_path / "exported" / "README.md").read_text()
    assert "9 images of 1 prompts, 32 px" in text
    assert "Not measured: the samples stage has not run." in text
    assert "## Limits" in text
    bias = {"mean": 0.5, "interval": [0.4, 0.6], "per_prompt": {}}
    figures = {
        "bias": {**bias, "per_prompt": {PROMPT: {"bias": 0.5, "interval": [0.3, 0.7]}}},
        "prompt_accuracy": {"mean": 0.99, "interval": [0.98, 1.0]},
        "frechet_distance": 12.0,
    }
    metrics = {
        "scales": {"0.0": figures, "1.0": figures},
        "data": {"bias": bias},
        "samples_per_prompt": 7,
        "classifier": {"attribute": 1.0, "prompt": 0.9},
        "frechet_distance": {"extractor": "efficientnet_lite0"},
    }
    (run / "samples").mkdir()
    (run / "samples" / "metrics.json").write_text(json.dumps(metrics))
    # An earlier export is replaced.
    assert main(["export", "--run-dir", str(run), "--output", str(tmp_path / "exported")]) == 0
    text = (tmp_path / "exported" / "README.md").read_text()
    assert f"| Bias of “{PROMPT}” | 0.500 [0.300, 0.700] | 0.500 [0.300, 0.700] |" in text
    assert "99.0 % [98.0, 100.0]" in text


def test_other_folders_are_neither_read_nor_overwritten(tiny_backbone, tmp_path, capsys) -> None:
    with pytest.raises(InvDiffError, match="neither a run folder"):
        InvDiffPipeline.from_pretrained(tmp_path)
    run = _run_folder(tmp_path / "run", tiny_backbone, "lora")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    assert main(["export", "--run-dir", str(run), "--output", str(precious)]) == 2
    assert "no earlier export" in capsys.readouterr().err
    assert (precious / "thesis.txt").read_text() == "all of it"
    record = run / "adapter" / "stage.json"
    record.write_text(record.read_text().replace(str(tiny_backbone), "gone/pipeline"))
    with pytest.raises(InvDiffError, match="give it with backbone="):
        InvDiffPipeline.from_pretrained(run)
    assert InvDiffPipeline.from_pretrained(run, backbone=str(tiny_backbone)).adapter.size() > 0


def test_importing_the_package_does_not_import_torch() -> None:
    words = "import sys, invdiff_pl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0
