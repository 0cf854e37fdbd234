"""Guidance by clusters: reads what it should, moves samples where it says, and is off at 0."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.new_pipeline import tiny_pipeline
from invdiff_pl.backbones.pipeline import frozen, sample_images
from invdiff_pl.backbones.prompts import Conditions, KnownPrompts

PROMPTS = ("a photo of a nurse", "a photo of a pilot")
STEPS = 5
SETTINGS: dict[str, Any] = {"seed": 3, "steps": STEPS, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def guidance() -> Any:
    """The module, as scripts import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        return import_module("cluster_guidance")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    found = frozen(tiny_pipeline(PROMPTS))
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def conditions(pipeline: Any) -> Conditions:
    return KnownPrompts(frozen_denoiser(pipeline), PROMPTS).conditions()


@pytest.fixture(scope="module")
def readings(guidance: Any, pipeline: Any, conditions: Conditions) -> Any:
    return guidance.find_clusters(pipeline, conditions, per_prompt=24, batch_size=16, **SETTINGS)


def blobs(centres: list[float], each: int, width: int = 6) -> tuple[Tensor, Tensor]:
    """Points about centres on a diagonal, and which centre each belongs to."""
    source = torch.Generator().manual_seed(0)
    belongs = torch.arange(len(centres)).repeat_interleave(each)
    noise = 0.3 * torch.randn(len(belongs), width, generator=source)
    return torch.tensor(centres)[belongs, None] + noise, belongs


@pytest.mark.parametrize("centres", [[0.0, 5.0], [0.0, 5.0, 10.0], [0.0, 4.0, 8.0, 12.0]])
def test_as_many_clusters_are_found_as_there_are(guidance: Any, centres: list[float]) -> None:
    points, belongs = blobs(centres, 15)
    found = guidance.cluster(points, seed=0)
    assert len(torch.stack([found, belongs]).unique(dim=1).T) == len(centres)


def test_the_silhouette_is_that_of_rousseeuw_by_hand(guidance: Any) -> None:
    points = torch.tensor([[0.0], [1.0], [4.0], [6.0], [20.0]]).double()
    clusters = torch.tensor([0, 0, 1, 1, 2])
    widths = [1 - 1 / 5, 1 - 1 / 4, 1 - 2 / 3.5, 1 - 2 / 5.5, 0.0]
    found = guidance.silhouette(torch.cdist(points, points), clusters)
    assert found == pytest.approx(sum(widths) / 5)


def test_a_reading_tells_clusters_apart_whatever_their_shares(guidance: Any) -> None:
    points, belongs = blobs([0.0, 2.0], 100)
    kept = torch.cat([torch.arange(100), torch.arange(100, 110)])
    weights, biases = guidance.reading(points[kept], belongs[kept])
    assert ((points @ weights.T + biases).argmax(1) == belongs).float().mean() > 0.99


def test_a_prompts_clusters_are_assigned_in_turn(guidance: Any) -> None:
    biases = torch.zeros(2, 1, 3)
    biases[0, :, 2] = -torch.inf
    readings = guidance.Readings(torch.zeros(2, 1, 3, 4), biases, torch.zeros(2, 3))
    prompts, places = torch.tensor([0] * 6 + [1] * 6), torch.arange(12) % 6
    found = readings.assigned(prompts, places)
    assert found.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 2, 0, 1, 2]


def drawn(pipeline: Any, conditions: Conditions, prompts: Tensor, callback: Any) -> Tensor:
    return sample_images(
        pipeline,
        conditions[prompts],
        conditions.null,
        range(len(prompts)),
        callback_on_step_end=callback,
        **SETTINGS,
    )


def guide(guidance: Any, pipeline: Any, readings: Any, rows: Any, strength: float) -> Any:
    prompts, condition = rows
    assigned = readings.assigned(prompts, torch.arange(len(prompts)))
    denoiser = frozen_denoiser(pipeline)
    return guidance.Guide(denoiser, readings, strength, condition, prompts, assigned)


def test_with_strength_0_images_are_those_of_the_stock_pipeline(
    guidance: Any, pipeline: Any, conditions: Conditions, readings: Any
) -> None:
    prompts = torch.tensor([0, 0, 1, 1])
    rows = prompts, conditions[prompts]
    stock = drawn(pipeline, conditions, prompts, None)
    off, on = (
        drawn(pipeline, conditions, prompts, guide(guidance, pipeline, readings, rows, strength))
        for strength in (0.0, 0.5)
    )
    assert off.equal(stock)
    assert not on.equal(stock)


def test_guided_samples_are_more_surely_in_their_clusters(
    guidance: Any, pipeline: Any, conditions: Conditions, readings: Any
) -> None:
    prompts = torch.arange(12) % 2
    rows = prompts, conditions[prompts]
    last = readings.weights.shape[1] - 1
    reached = []
    for strength in (0.0, 0.2):
        inside: list[Tensor] = []

        def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
            if step == last:
                following = pipe.scheduler.timesteps[step + 1]
                latents = tensors["latents"]
                inside.append(guided.log_probabilities(latents, following, step))  # noqa: B023
            return guided(pipe, step, timestep, tensors)  # noqa: B023

        guided = guide(guidance, pipeline, readings, rows, strength)
        drawn(pipeline, conditions, prompts, look)
        reached.append(inside[0])
    assert reached[1].mean() > reached[0].mean()


def test_a_small_move_raises_every_samples_probability(
    guidance: Any, pipeline: Any, conditions: Conditions, readings: Any
) -> None:
    prompts = torch.arange(8) % 2
    guided = guide(guidance, pipeline, readings, (prompts, conditions[prompts]), 1e-3)
    pipeline.scheduler.set_timesteps(STEPS)
    source = torch.Generator().manual_seed(1)
    latents = torch.randn(8, *frozen_denoiser(pipeline).latent_shape, generator=source)
    after = guided(pipeline, 0, None, {"latents": latents})["latents"]
    following = pipeline.scheduler.timesteps[1]
    with torch.no_grad():
        low, high = (guided.log_probabilities(each, following, 0) for each in (latents, after))
    unsure = low < -0.1  # others have arrived
    assert unsure.any()
    assert (high > low)[unsure].all()
