"""The pipeline to take away: stock behaviour, an invariant scale, round trips, and the export."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_cases import KINDS, PROMPT, disturb, run_folder
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from huggingface_hub import ModelCard

from invdiff_pl import InvDiffPipeline
from invdiff_pl.adapters import build_adapter
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.cli.main import main
from invdiff_pl.utils.errors import InvDiffError


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
    run = run_folder(tmp_path / "run", tiny_backbone, kind)
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
    run = run_folder(tmp_path / "run", tiny_backbone, "lora")
    main(["export", "--run-dir", str(run), "--output", str(tmp_path / "exported")])
    stock = _stock(tmp_path / "exported")
    stock.load_lora_weights(tmp_path / "exported" / "adapter")
    ours = _draw(InvDiffPipeline.from_pretrained(tmp_path / "exported"))
    assert np.array_equal(_draw(stock), ours)


@pytest.fixture(scope="module")
def style(tiny_backbone, tmp_path_factory) -> Path:
    """Somebody else's LoRA, which adapts some of the layers."""
    folder = tmp_path_factory.mktemp("style")
    adapter = build_adapter(
        "lora", load_pipeline(str(tiny_backbone)).unet, rank=3, layers=("attention", "input_output")
    )
    disturb(adapter)
    adapter.save(folder)
    return folder


def _stock_with(backbone: Path, *loras: tuple[str, Path, float]) -> np.ndarray:
    """What a stock pipeline draws with LoRAs of these names and weights."""
    stock = _stock(backbone)
    for name, folder, _ in loras:
        stock.load_lora_weights(folder, adapter_name=name)
    stock.set_adapters([name for name, *_ in loras], [weight for *_, weight in loras])
    return _draw(stock)


def test_a_second_lora_is_combined_as_in_stock_diffusers_whatever_was_drawn_before(
    tiny_backbone, style, tmp_path
) -> None:
    run = run_folder(tmp_path / "run", tiny_backbone, "lora")
    mine = run / "adapter" / "adapter"
    pipeline = InvDiffPipeline.from_pretrained(run)
    alone = _draw(pipeline)
    for scale in (0.5, 0.0):
        _draw(pipeline, invariant_scale=scale)
    pipeline.load_lora_weights(style, adapter_name="style")
    assert pipeline.get_active_adapters() == ["invdiff", "style"]

    both = _stock_with(tiny_backbone, ("invdiff", mine, 1.0), ("style", style, 1.0))
    assert not np.array_equal(both, alone)
    assert np.array_equal(_draw(pipeline), both)
    part = _stock_with(tiny_backbone, ("invdiff", mine, 0.4), ("style", style, 1.0))
    assert np.array_equal(_draw(pipeline, invariant_scale=0.4), part)
    theirs = _stock_with(tiny_backbone, ("style", style, 1.0))
    assert np.array_equal(_draw(pipeline, invariant_scale=0.0), theirs)
    assert np.array_equal(_draw(pipeline), both)

    pipeline.set_adapters(["style", "invdiff"], [0.7, 0.5])
    weighted = _stock_with(tiny_backbone, ("style", style, 0.7), ("invdiff", mine, 0.5))
    np.testing.assert_allclose(_draw(pipeline), weighted, atol=1e-5)  # of another order of sums
    pipeline.set_adapters("style")
    assert np.array_equal(_draw(pipeline), theirs)
    assert np.array_equal(_draw(pipeline, invariant_scale=0.4), theirs)
    pipeline.delete_adapters("style")
    pipeline.set_adapters("invdiff")
    assert np.array_equal(_draw(pipeline), alone)


def test_fused_loras_draw_as_in_stock_diffusers_and_have_no_scale(
    tiny_backbone, style, tmp_path
) -> None:
    run = run_folder(tmp_path / "run", tiny_backbone, "lora")
    pipeline = InvDiffPipeline.from_pretrained(run)
    pipeline.load_lora_weights(style, adapter_name="style")
    pipeline.fuse_lora(adapter_names=["invdiff", "style"])
    stock = _stock(tiny_backbone)
    stock.load_lora_weights(run / "adapter" / "adapter", adapter_name="invdiff")
    stock.load_lora_weights(style, adapter_name="style")
    stock.fuse_lora(adapter_names=["invdiff", "style"])
    assert np.array_equal(_draw(pipeline), _draw(stock))
    with pytest.raises(InvDiffError, match=r"call unfuse_lora\(\) first"):
        _draw(pipeline, invariant_scale=0.5)


@pytest.mark.parametrize("kind", ["small_unet", "bottleneck"])
def test_adapters_of_other_kinds_are_combined_with_a_lora_of_the_backbone(
    kind, tiny_backbone, style, tmp_path
) -> None:
    pipeline = InvDiffPipeline.from_pretrained(run_folder(tmp_path / "run", tiny_backbone, kind))
    alone = _draw(pipeline)
    pipeline.load_lora_weights(style, adapter_name="style")
    theirs = _stock_with(tiny_backbone, ("style", style, 1.0))
    assert np.array_equal(_draw(pipeline, invariant_scale=0.0), theirs)
    assert not np.array_equal(_draw(pipeline), theirs)
    pipeline.set_adapters("style", 0.7)
    weighted = _stock_with(tiny_backbone, ("style", style, 0.7))
    assert np.array_equal(_draw(pipeline, invariant_scale=0.0), weighted)
    pipeline.delete_adapters("style")
    assert np.array_equal(_draw(pipeline), alone)


@pytest.mark.parametrize("kind", list(KINDS))
def test_made_from_ones_own_pipeline_it_draws_as_loaded_from_the_run(
    kind, tiny_backbone, tmp_path
) -> None:
    run = run_folder(tmp_path / "run", tiny_backbone, kind)
    own = _stock(tiny_backbone)
    before = _draw(own)
    plain = InvDiffPipeline.from_pipe(own)
    assert np.array_equal(_draw(plain), before)
    with pytest.raises(InvDiffError, match="carries no adapter"):
        _draw(plain, invariant_scale=0.5)
    with pytest.raises(InvDiffError, match="no adapter to save"):
        plain.save_pretrained(tmp_path / "saved")

    expected = InvDiffPipeline.from_pretrained(run)
    pipeline = InvDiffPipeline.from_pipe(own, lora=run)
    assert pipeline.vae is own.vae
    for scale in (0.5, 0.0, 1.0):
        images = _draw(pipeline, invariant_scale=scale)
        assert np.array_equal(images, _draw(expected, invariant_scale=scale))
    assert np.array_equal(_draw(pipeline, invariant_scale=0.0), before)
    again = InvDiffPipeline.from_pipe(pipeline)
    assert np.array_equal(_draw(again, invariant_scale=0.5), _draw(expected, invariant_scale=0.5))
    with pytest.raises(InvDiffError, match="already"):
        InvDiffPipeline.from_pipe(pipeline, lora=run)


def test_ones_own_pipeline_keeps_its_lora_and_its_dtype(tiny_backbone, style, tmp_path) -> None:
    run = run_folder(tmp_path / "run", tiny_backbone, "lora")
    mine = run / "adapter" / "adapter"
    own = _stock(tiny_backbone)
    own.load_lora_weights(style, adapter_name="style")
    own.set_adapters("style", 0.7)
    pipeline = InvDiffPipeline.from_pipe(own, lora=mine)
    both = _stock_with(tiny_backbone, ("style", style, 0.7), ("invdiff", mine, 1.0))
    assert np.array_equal(_draw(pipeline), both)
    assert np.array_equal(_draw(own), both)
    theirs = _stock_with(tiny_backbone, ("style", style, 0.7))
    assert np.array_equal(_draw(pipeline, invariant_scale=0.0), theirs)
    pipeline.save_pretrained(tmp_path / "saved")
    alone = _draw(InvDiffPipeline.from_pretrained(run))
    assert np.array_equal(_draw(InvDiffPipeline.from_pretrained(tmp_path / "saved")), alone)

    reduced = InvDiffPipeline.from_pipe(_stock(tiny_backbone).to(torch.bfloat16), lora=run)
    parts = (reduced.unet, reduced.vae, reduced.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}


def test_schedulers_callbacks_and_dtypes_are_as_in_diffusers(tiny_backbone, tmp_path) -> None:
    run = run_folder(tmp_path / "run", tiny_backbone, "small_unet")
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
    assert reduced.adapter is not None
    assert next(iter(reduced.adapter.parameters().values())).dtype == torch.bfloat16
    assert np.isfinite(_draw(reduced)).all()


def test_the_card_tells_training_and_limits_and_admits_what_was_not_measured(
    tiny_backbone, tmp_path
) -> None:
    run = run_folder(tmp_path / "run", tiny_backbone, "lora")
    main(["export", "--run-dir", str(run), "--output", str(tmp_path / "exported")])
    text = (tmp_path / "exported" / "README.md").read_text()
    assert ModelCard(text).data.to_dict()["tags"][-1] == "lora"
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
    run = run_folder(tmp_path / "run", tiny_backbone, "lora")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    assert main(["export", "--run-dir", str(run), "--output", str(precious)]) == 2
    assert "not an earlier export" in capsys.readouterr().err
    assert (precious / "thesis.txt").read_text() == "all of it"
    record = run / "adapter" / "stage.json"
    record.write_text(record.read_text().replace(str(tiny_backbone), "gone/pipeline"))
    with pytest.raises(InvDiffError, match="give it with backbone="):
        InvDiffPipeline.from_pretrained(run)
    found = InvDiffPipeline.from_pretrained(run, backbone=str(tiny_backbone)).adapter
    assert found is not None
    assert found.size() > 0


def test_importing_the_package_does_not_import_torch() -> None:
    words = "import sys, invdiff_pl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0
