"""The library on a pipeline and images at hand: no run folder, no YAML, any Trainer."""

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from birds_data import birds_data
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from trainers import adapter_trainer

import invdiff_pl as inv
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.callbacks import ExponentialMovingAverage, HeldOutSelection
from invdiff_pl.data.environments import Environments, read_environments
from invdiff_pl.data.latents import encoded
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings
from invdiff_pl.environments.page import discovery_page
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json
from invdiff_pl.utils.progress import Lines

PROMPTS = ("a photo of a mallard", "a photo of a raven")
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def pipe(tiny_backbone: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_backbone, safety_checker=None)


def _stock_trainer(folder: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        **settings,
    )


def _images(count: int = 24) -> tuple[inv.PromptedImages, torch.Tensor]:
    """Pictures of two prompts, and environments of which every third image is in the second."""
    pixels = torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(count)
    return inv.PromptedImages(pixels, [PROMPTS[n % 2] for n in range(count)]), numbers % 3 // 2


def _state(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


def test_a_stock_trainer_on_latents_in_memory_ends_at_the_weights_of_the_stage(
    birds, tiny_backbone, tmp_path
) -> None:
    data = birds_data(birds, tiny_backbone, tmp_path / "cache")
    data.prepare_data()
    assignments = (torch.arange(len(data.train_prompts())) % 4 == 0).long()
    groups = Environments(torch.nn.functional.one_hot(assignments, 2).float())
    data.environments, data._inferred = tmp_path, groups
    settings: dict[str, Any] = {"learning_rate": 0.01, "warmup_steps": 1}

    def callbacks() -> list[pl.Callback]:
        return [ExponentialMovingAverage(0.5), HeldOutSelection(2, images=12)]

    module = inv.InvariantAdapter(str(tiny_backbone), **settings)
    adapter_trainer(tmp_path / "stage", max_steps=3, callbacks=callbacks()).fit(
        module, datamodule=data
    )

    pipe = load_pipeline(str(tiny_backbone))
    index = data.index
    paths = index.paths(index.rows("train"))
    images = inv.PromptedImages(paths, [index.prompts[n] for n in data.train_prompts().tolist()])
    held = inv.LatentsInMemory(
        torch.cat(list(encoded(pipe.vae, images, 32))),
        images.prompts,
        images.prompt_ids,
        data.conditions().rows(),
        groups,
        batch_size=data.batch_size,
    )
    module = inv.InvariantAdapter(pipe, **settings)
    trainer = _stock_trainer(tmp_path, max_steps=3, callbacks=callbacks())
    trainer.fit(module, datamodule=held)
    module.adapter.save(tmp_path / "library")
    expected = load_file(tmp_path / "stage" / "adapter" / FILE)
    found = load_file(tmp_path / "library" / FILE)
    assert any(value.any() for name, value in expected.items() if "lora_B" in name)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_any_loader_with_texts_and_environment_numbers_trains(pipe, tmp_path) -> None:
    rows = [
        {"latents": torch.randn(4, 16, 16), "prompt": PROMPTS[n % 2], "environment": n % 3 // 2}
        for n in range(24)
    ]
    module = inv.InvariantAdapter(pipe, learning_rate=0.01, warmup_steps=1)
    start = {name: value.clone() for name, value in module.trainable_parameters().items()}
    trainer = _stock_trainer(tmp_path, max_steps=3)
    trainer.fit(module, DataLoader(rows, batch_size=8))  # type: ignore[arg-type]
    assert trainer.global_step == 3
    trained = module.trainable_parameters()
    assert any(not torch.equal(trained[name], value) for name, value in start.items())


@pytest.mark.parametrize(
    ("batch", "settings", "message"),
    [
        ({"prompt": ["a"]}, {}, "neither 'latents' nor 'moments'"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, {}, "lack 'prompt'"),
        ({"latents": torch.zeros(1, 4, 16, 16), "prompt": ["a"]}, {}, "neither 'environment'"),
        (
            {
                "latents": torch.zeros(1, 4, 16, 16),
                "prompt": ["a"],
                "environment": torch.tensor([2]),
            },
            {},
            "groups=2: a batch holds environment 2",
        ),
        (
            {
                "latents": torch.zeros(1, 4, 16, 16),
                "prompt": ["a"],
                "environment": torch.tensor([0]),
            },
            {"accumulate_grad_batches": 2},
            "accumulate_grad_batches=2 needs a loader whose sampler",
        ),
    ],
)
def test_loaders_that_lack_something_are_refused_by_name(
    batch, settings, message, pipe, tmp_path
) -> None:
    trainer = _stock_trainer(tmp_path, max_steps=1, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.fit(inv.InvariantAdapter(pipe), DataLoader([batch], batch_size=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("progress", [True, False])
def test_training_is_told_of_in_lines_where_output_is_no_terminal(
    pipe, monkeypatch, progress
) -> None:
    told: list[str] = []
    lines = Lines(every=0, soon=0, write=told.append)
    monkeypatch.setattr("invdiff_pl.utils.progress._lines", lines)
    images, environments = _images()
    few: dict[str, Any] = {"steps": 2, "batch_size": 8, "calibration_samples": 0}
    inv.debias(pipe, images, environments, progress=progress, **few)
    steps = [line for line in told if line.startswith("adapter: step")]
    assert len(steps) == (2 if progress else 0)


def test_debiasing_gives_the_pipeline_back_as_it_was_and_an_adapter_to_keep(pipe, tmp_path) -> None:
    images, environments = _images()
    before, drawn = _state(pipe), _draw(pipe)
    pipe.unet.train()
    lora = inv.debias(
        pipe,
        images,
        environments,
        steps=2,
        batch_size=8,
        learning_rate=0.05,
        warmup_steps=1,
        calibration_samples=0,
        progress=False,
    )
    assert pipe.unet.training
    assert all(value.requires_grad for value in pipe.unet.parameters())
    after = _state(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(_draw(pipe), drawn)
    assert lora.trained
    assert lora.reports["heldout"]["selection"]["candidates"]

    folder = lora.save(tmp_path / "even")
    with pytest.raises(ValueError, match="is not empty"):
        lora.save(folder)
    own = inv.InvDiffPipeline.from_pipe(pipe, lora)
    with_lora = _draw(own)
    assert torch.equal(_draw(own, invariant_scale=0.0), drawn)
    assert not torch.equal(with_lora, drawn)
    stock = StableDiffusionPipeline.from_pretrained(pipe.config._name_or_path, safety_checker=None)
    stock.load_lora_weights(folder)
    torch.testing.assert_close(_draw(stock), with_lora, rtol=1e-4, atol=1e-4)


def _draw(pipe: Any, **settings: Any) -> torch.Tensor:
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(3)
    called = pipe(PROMPTS[0], num_inference_steps=2, output_type="pt", generator=source, **settings)
    return called.images


@pytest.mark.parametrize(
    ("environments", "message"),
    [
        (torch.zeros(3), "they are of 3 images, not of 24"),
        (torch.zeros(24), "at least two environments"),
    ],
)
def test_environments_of_other_images_are_refused(environments, message, pipe) -> None:
    with pytest.raises(ValueError, match=f"environments: .*{message}"):
        inv.debias(pipe, _images()[0], environments, progress=False)


def test_a_trainer_of_ones_own_trains_as_it_is_set(pipe, tmp_path) -> None:
    images, environments = _images()
    trainer = _stock_trainer(tmp_path, max_steps=1, use_distributed_sampler=False)
    inv.debias(
        pipe, images, environments, trainer=trainer, batch_size=8, calibration_samples=0, steps=99
    )
    assert trainer.global_step == 1


def test_generated_images_are_those_of_their_seeds_whatever_the_batch(pipe) -> None:
    settings: dict[str, Any] = {"per_prompt": 3, "steps": 2, "progress": False}
    whole = inv.generate(pipe, PROMPTS, batch_size=6, **settings)
    parts = inv.generate(pipe, PROMPTS, batch_size=4, **settings)
    assert (len(whole), whole.prompts) == (6, PROMPTS)
    assert whole.prompt_ids.tolist() == [0, 0, 0, 1, 1, 1]
    difference = whole.pixels(range(6), 32).int() - parts.pixels(range(6), 32).int()
    assert difference.abs().max() <= 1


def _biased_images(count: int = 160) -> tuple[inv.PromptedImages, torch.Tensor]:
    """Pictures of two prompts that are dark or bright, and which go against what is usual."""
    source = torch.Generator().manual_seed(1)
    numbers = torch.arange(count)
    against = torch.rand(count, generator=source) < 0.1
    bright = (numbers % 2 == 0) != against
    pixels = 0.2 * torch.rand((count, 3, 32, 32), generator=source)
    pixels = pixels + 0.6 * bright[:, None, None, None]
    return inv.PromptedImages(pixels, [PROMPTS[n % 2] for n in range(count)]), against


def _auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """How often a positive one has the higher score, by counting pairs."""
    return float((scores[positive][:, None] > scores[~positive]).double().mean())


FEW = HiddenAttributeSettings(starts=8, values=(), resamples=19)


def test_discover_finds_what_goes_along_with_prompts_and_leaves_the_pipeline_alone(
    pipe, tmp_path
) -> None:
    images, against = _biased_images()
    before = _state(pipe)
    found = inv.discover(pipe, images, settings=FEW, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in _state(pipe).items())
    best = found[0]
    assert best.memberships.shape == (160, 2)
    assert (best.memberships.dtype, best.conflict.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(best.memberships.sum(1), torch.ones(160, dtype=torch.float64))
    torch.testing.assert_close(best.shares.sum(1), torch.ones(2, dtype=torch.float64))
    assert _auc(best.conflict, against) > 0.95
    assert best.reason in repr(found)

    assert best.sheet(0).size == best.sheet(PROMPTS[0]).size
    with pytest.raises(ValueError, match="prompt=7: expected one of the 2 prompts"):
        best.sheet(7)
    table = best.to_pandas()
    assert list(table.columns) == ["prompt", "group", "probability", "conflict"]
    assert len(table) == 160
    shares = found.to_pandas()
    assert len(shares) == 2 * len(found)
    folder = found.save(tmp_path / "found")
    assert {"discovery.csv", "candidate-0"} <= {path.name for path in folder.iterdir()}
    written = load_file(folder / "candidate-0" / "environments.safetensors")
    assert torch.equal(written["groups"], best.memberships.float())
    assert torch.equal(written["assignments"], best.environments.argmax(1))
    assert (folder / "candidate-0" / "sheet-01.png").is_file()
    facts = read_json(folder / "environments.json")
    assert facts["candidates"][0]["verdict"] == best.verdict
    assert read_environments(folder, 160, candidate=0).groups == 2

    lora = inv.debias(
        pipe, images, best, steps=1, batch_size=8, calibration_samples=0, progress=False
    )
    assert lora.trained


def test_discover_refuses_captions_that_occur_once_each(pipe) -> None:
    images = inv.PromptedImages(torch.zeros(3, 3, 32, 32), ["a", "b", "c"])
    with pytest.raises(ValueError, match="each of the 3 prompts occurs once"):
        inv.discover(pipe, images, progress=False)


def test_discover_takes_features_of_ones_own(pipe) -> None:
    images, against = _biased_images()
    noise = torch.randn(160, 4, generator=torch.Generator().manual_seed(2))
    bright = (torch.arange(160) % 2 == 0) != against
    features = torch.cat([noise, noise[:, :1] + 8.0 * bright[:, None]], dim=1)
    found = inv.discover(pipe, images, embeddings=features, settings=FEW, progress=False)
    assert _auc(found[0].conflict, against) > 0.95
    with pytest.raises(ValueError, match=r"found float32 of shape \[3, 5\]; expected floats \[160"):
        inv.discover(pipe, images, embeddings=features[:3], progress=False)
    with pytest.raises(
        InvDiffError, match=r"embeddings=none.npy: expected an existing file"
    ) as told:
        inv.discover(pipe, images, embeddings="none.npy", progress=False)
    assert told.value.arguments == ("embeddings",)
    features[7, 1] = torch.nan
    with pytest.raises(InvDiffError, match=r"image 7 .counted from 0. are not finite"):
        inv.discover(pipe, images, embeddings=features, progress=False)


def test_discover_takes_a_function_that_makes_features_of_pictures(pipe) -> None:
    images, against = _biased_images()

    def colours(pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1)

    found = inv.discover(pipe, images, embeddings=colours, settings=FEW, progress=False)
    assert _auc(found[0].conflict, against) > 0.95


def test_the_page_shows_the_candidates_and_escapes_what_it_is_given(pipe) -> None:
    images, _ = _biased_images()
    strange = [f"<b>{images.prompts[n]}</b>" for n in images.prompt_ids.tolist()]
    images = inv.PromptedImages(images.pixels(range(160), 32), strange)
    found = inv.discover(pipe, images, settings=FEW, progress=False)
    page = discovery_page(found)
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert page.count("<article") == min(5, len(found))
    assert "--adapter.candidate=0" in page
    assert "inv.debias(pipe, images, found[0])" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "script" not in page
