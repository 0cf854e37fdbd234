"""The scale of a trained adapter, told by counting samples by environment."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from trainers import adapter_trainer

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


@dataclass(frozen=True)
class _Run:
    """A calibrated run's folder, what it tells, and the scales at which the update was folded."""

    folder: Path
    told: dict[str, Any]
    folded: frozenset[float]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter" / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def trained(module_of, tiny_backbone, environments, tmp_path_factory) -> Callable[..., _Run]:
    """Trains for two steps and calibrates; once for the same settings."""

    @functools.cache
    def train(
        precision: str = "32-true", ranks: int = 1, samples: int = 13, least_recall: float = 0.0
    ) -> _Run:
        folder = tmp_path_factory.mktemp("adapter")
        module = InvariantAdapter(str(tiny_backbone), learning_rate=0.01, warmup_steps=1)
        calibration = ScaleCalibration(
            samples=samples,
            least_recall=least_recall,
            steps=2,
            guidance_scale=1.0,
            output=str(folder),
        )
        trainer = adapter_trainer(
            folder, ranks, callbacks=[calibration], max_steps=2, precision=precision
        )
        data = module_of(environments=str(environments), batch_size=8)
        folded: list[float] = []
        prepare = LoraAdapter.prepare_sampling

        def noted(self: LoraAdapter, pipeline: StableDiffusionPipeline, scale: float) -> None:
            folded.append(scale)
            prepare(self, pipeline, scale)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoraAdapter, "prepare_sampling", noted)
            trainer.fit(module, datamodule=data)
        file = folder / "calibration.json"
        return _Run(folder, read_json(file) if file.is_file() else {}, frozenset(folded))

    return train


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_written_adapter_is_the_trained_one_at_the_scale_told(precision, trained) -> None:
    plain, scaled = trained(precision, samples=0), trained(precision)
    assert not plain.told
    assert 0.5 <= scaled.told["scale"] <= 2.0
    assert {1.0, 1.5} <= {row["scale"] for row in scaled.told["measured"]}
    for row in scaled.told["measured"]:
        shares = torch.tensor(row["shares"])
        torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
    after = scaled.weights
    for name, value in plain.weights.items():
        up = ".lora.up." in name or ".lora_B." in name
        factor = scaled.told["scale"] if up else 1.0
        torch.testing.assert_close(after[name], factor * value)


def test_in_half_precision_updates_are_counted_beside_the_weights(trained) -> None:
    assert not trained("bf16-mixed").folded
    assert {0.0, 1.0, 1.5} <= trained("32-true").folded


def test_where_environments_cannot_be_read_the_adapter_stays_as_it_is(trained) -> None:
    left = trained("32-true", least_recall=1.01)
    assert left.told["scale"] == 1.0
    assert "cannot be told from features" in left.told["reason"]
    weights = left.weights
    for name, value in trained("32-true", samples=0).weights.items():
        assert torch.equal(weights[name], value)


def test_even_shares_beyond_the_scales_that_are_tried_bring_a_warning(trained, monkeypatch) -> None:
    plain = trained("32-true").told
    assert ("warning" in plain) == (plain["scale"] in (0.5, 2.0))
    monkeypatch.setattr("invdiff_pl.callbacks.calibration.even_scale", max)
    told = trained("32-true", samples=14).told
    assert told["scale"] == 2.0
    assert told["warning"].startswith("even shares lie beyond scale 2, the last that is tried")


def test_two_ranks_tell_the_same_scale_as_one(trained) -> None:
    one, two = trained("32-true").told, trained("32-true", ranks=2).told
    assert one["measured"] == two["measured"]
    assert one["scale"] == two["scale"]


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
