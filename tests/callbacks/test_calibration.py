"""The scale of a trained adapter, told by counting samples by environment."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from trainers import adapter_trainer, infer

from invdiff_pl.adapters import LoraAdapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import (
    load_pipeline,
    sample_antithetic_latents,
)
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.callbacks import ScaleCalibration
from invdiff_pl.modules import InvariantAdapter
from invdiff_pl.utils.files import read_json


@pytest.fixture(scope="module")
def environments(module_of, tiny_backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environments")
    infer(tiny_backbone, folder, module_of())
    return folder


def _trained(
    folder: Path,
    module_of,
    backbone,
    environments,
    ranks: int = 1,
    precision: str = "32-true",
    **settings,
) -> Path:
    """The adapter stage's folder after two steps and a calibration."""
    module = InvariantAdapter(
        str(backbone), learning_rate=0.01, warmup_steps=1, train_without_bias=True
    )
    calibration = ScaleCalibration(steps=2, guidance_scale=1.0, output=str(folder), **settings)
    trainer = adapter_trainer(
        folder, ranks, callbacks=[calibration], max_steps=2, precision=precision
    )
    trainer.fit(module, datamodule=module_of(environments=str(environments), batch_size=8))
    return folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_written_adapter_is_the_trained_one_at_the_scale_told(
    precision, module_of, tiny_backbone, environments, tmp_path
) -> None:
    given = module_of, tiny_backbone, environments, 1, precision
    plain = _trained(tmp_path / "plain", *given, samples=0)
    assert not (plain / "calibration.json").exists()
    scaled = _trained(tmp_path / "scaled", *given, samples=12, least_recall=0.0)
    told = read_json(scaled / "calibration.json")
    assert 0.5 <= told["scale"] <= 2.0
    assert {1.0, 1.5} <= {row["scale"] for row in told["measured"]}
    for row in told["measured"]:
        shares = torch.tensor(row["shares"])
        torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    before, after = _weights(plain), _weights(scaled)
    for name, value in before.items():
        factor = told["scale"] if ".lora.up." in name or ".lora_B." in name else 1.0
        torch.testing.assert_close(after[name], factor * value)


def test_in_half_precision_updates_are_counted_beside_the_weights(
    module_of, tiny_backbone, environments, tmp_path, monkeypatch
) -> None:
    folded: list[float] = []
    prepare = LoraAdapter.prepare_sampling

    def noted(self: LoraAdapter, pipeline: StableDiffusionPipeline, scale: float) -> None:
        folded.append(scale)
        prepare(self, pipeline, scale)

    monkeypatch.setattr(LoraAdapter, "prepare_sampling", noted)
    given = module_of, tiny_backbone, environments, 1
    _trained(tmp_path / "half", *given, "bf16-mixed", samples=12, least_recall=0.0)
    assert not folded
    _trained(tmp_path / "single", *given, "32-true", samples=12, least_recall=0.0)
    assert {0.0, 1.0, 1.5} <= set(folded)


def test_where_environments_cannot_be_read_the_adapter_stays_as_it_is(
    module_of, tiny_backbone, environments, tmp_path
) -> None:
    given = module_of, tiny_backbone, environments
    plain = _trained(tmp_path / "plain", *given, samples=0)
    left = _trained(tmp_path / "left", *given, samples=12, least_recall=1.01)
    told = read_json(left / "calibration.json")
    assert told["scale"] == 1.0
    assert "cannot be told from features" in told["reason"]
    for name, value in _weights(plain).items():
        assert torch.equal(_weights(left)[name], value)


def test_two_ranks_tell_the_same_scale_as_one(
    module_of, tiny_backbone, environments, tmp_path
) -> None:
    given = module_of, tiny_backbone, environments
    told = [
        read_json(
            _trained(tmp_path / str(ranks), *given, ranks, samples=13, least_recall=0.0)
            / "calibration.json"
        )
        for ranks in (1, 2)
    ]
    assert told[0]["measured"] == told[1]["measured"]
    assert told[0]["scale"] == told[1]["scale"]


def test_samples_come_in_pairs_of_opposite_noise(tiny_backbone) -> None:
    pipeline = load_pipeline(str(tiny_backbone))
    pipeline.scheduler.set_timesteps(1)
    denoiser = frozen_denoiser(pipeline)
    conditions = Conditions(denoiser.condition(["a photo of a mallard", ""]))
    started: list[torch.Tensor] = []
    pipeline.unet.register_forward_pre_hook(lambda unet, args: started.append(args[0].clone()))
    sample_antithetic_latents(
        pipeline,
        conditions[torch.zeros(4, dtype=torch.int64)],
        conditions.null,
        [0, 1, 6, 7],
        seed=3,
        steps=1,
        guidance_scale=1.0,
    )
    first = started[0]
    assert torch.equal(first[0], -first[1])
    assert torch.equal(first[2], -first[3])
    expected = denoiser.initial_noise([0, 3], 3)[0] * pipeline.scheduler.init_noise_sigma
    torch.testing.assert_close(first[::2], expected)
