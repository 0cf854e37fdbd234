"""Modules under a stock Trainer with a loader in memory: no run folder, no YAML, no DataModule."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from invdiff_pl import PromptedImages
from invdiff_pl.backbones.architecture import Architecture
from invdiff_pl.backbones.new_pipeline import tiny_pipeline
from invdiff_pl.backbones.pipeline import load_pipeline, sample_images
from invdiff_pl.callbacks import (
    LatentScale,
    SaveClassifier,
    SavePipeline,
    SaveSamples,
)
from invdiff_pl.data.batches import BatchPlan, ShuffledBatches
from invdiff_pl.data.datasets import LatentDataset
from invdiff_pl.data.in_memory import LatentsInMemory
from invdiff_pl.data.samples import read_manifest, read_samples
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.modules import (
    AttributeClassifier,
    AugmentedClassifier,
    Autoencoder,
    Backbone,
    ConditionalSampler,
    ImageGeneration,
)
from invdiff_pl.utils.errors import InvDiffError

PROMPTS = ("a photo of a nurse", "a photo of a pilot")


def _trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


def _loader(rows: Any, **settings: Any) -> DataLoader[Any]:
    return DataLoader(rows, **settings)


def _predicted(trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader[Any]) -> Any:
    return trainer.predict(module, loader)


def _images(count: int = 16) -> torch.Tensor:
    pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return (255 * pixels).byte()


def _labelled(count: int = 16) -> list[dict[str, Any]]:
    """Images whose brightness tells the attribute and whose colour tells the prompt."""
    images = _images(count) // 4
    rows: list[dict[str, Any]] = [
        {"images": images[n], "prompt": n % 2, "attribute": n // 2 % 2} for n in range(count)
    ]
    for row in rows:
        row["images"][row["prompt"]] += 60
        row["images"] += 100 * row["attribute"]
    return rows


@pytest.mark.parametrize("texts", [True, False], ids=["texts", "numbers"])
def test_samples_are_those_of_the_pipeline_at_the_same_indices(texts: bool, tmp_path) -> None:
    pipe = tiny_pipeline(PROMPTS)
    numbers = [0, 0, 1, 1, 0]
    rows: list[Any] = [
        {"prompt": PROMPTS[n] if texts else n, "index": index}
        for index, n in zip((4, 1, 2, 3, 0), numbers, strict=True)
    ]
    module = ConditionalSampler(pipe, prompts=PROMPTS, steps=2, seed=5)
    trainer = _trainer(SaveSamples(str(tmp_path)))
    batches = _predicted(trainer, module, _loader(rows, batch_size=2))
    conditions = module.known.conditions()
    expected = {
        row["index"]: sample_images(
            pipe,
            conditions[torch.tensor([number])],
            conditions.null,
            [row["index"]],
            seed=5,
            steps=2,
            guidance_scale=2.0,
        )[0]
        for row, number in zip(rows, numbers, strict=True)
    }
    for batch in batches:
        for index, image in zip(batch["index"].tolist(), batch["images"][0.0], strict=True):
            # Rounding may differ between batches of one and of two.
            assert (image.int() - expected[index].int()).abs().max() <= 1
    manifest = read_manifest(tmp_path)
    assert [sample.index for sample in manifest] == [0, 1, 2, 3, 4]
    assert [sample.prompt_number for sample in manifest] == [0, 0, 1, 1, 0]
    kept = read_samples(tmp_path)
    assert kept.prompts == PROMPTS
    assert (kept.pixels([4], 32)[0].int() - expected[4].int()).abs().max() <= 1


def test_without_a_callback_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": text} for text in PROMPTS]
    module = ImageGeneration(tiny_pipeline(PROMPTS), steps=1, least_rare=0)
    (batch,) = _predicted(_trainer(), module, _loader(rows, batch_size=2))
    assert batch["images"][0.0].shape == (2, 3, 32, 32)
    assert module.drawn == dict(enumerate(PROMPTS))
    assert module.facts["counts"] == [1, 1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_backbone_trains_to_the_weights_that_its_datamodule_gives(lora_rank, tmp_path) -> None:
    folder = tmp_path / "start"
    pipe = tiny_pipeline(PROMPTS)
    pipe.save_pretrained(folder)
    images = PromptedImages(_images(), [PROMPTS[n % 2] for n in range(16)])
    settings: dict[str, Any] = {"lora_rank": lora_rank, "learning_rate": 1e-3, "warmup_steps": 1}
    data = LatentsInMemory.from_images(pipe, images, batch_size=8, progress=False)
    module = Backbone(str(folder), **settings)
    save = SavePipeline(str(tmp_path / "one"))
    _trainer(save, max_steps=3, use_distributed_sampler=False).fit(module, datamodule=data)

    # The same batches from a plain loader, without their draws, and with prompts as texts.
    batches = ShuffledBatches(16, BatchPlan(batch_size=8, seed=0, first=0, last=3))
    dataset = LatentDataset(data.moments(), data.train_prompts())
    drawn = [dataset[batches.micro_batch(step)] for step in range(3)]
    rows = [
        {"moments": batch["moments"], "prompt": [PROMPTS[n] for n in batch["prompt"].tolist()]}
        for batch in drawn
    ]
    module = Backbone(pipe, **settings)
    loader = _loader(rows, batch_size=None)
    _trainer(SavePipeline(str(tmp_path / "other")), max_steps=3).fit(module, loader)
    one, other = (
        load_pipeline(str(tmp_path / name / "pipeline")).unet for name in ("one", "other")
    )
    start = load_pipeline(str(folder)).unet.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in one.state_dict().items())
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_classifier_learns_what_a_plain_loader_shows_it(tmp_path) -> None:
    loader = _loader(_labelled(), batch_size=8, shuffle=True)
    module = AttributeClassifier(PROMPTS, ("dark", "bright"), learning_rate=0.01)
    _trainer(SaveClassifier(str(tmp_path)), max_steps=40).fit(module, loader, loader)
    assert module.confusion.sum(1).tolist() == [8, 8]
    network, facts = SampleClassifier.load(tmp_path / "classifier")
    assert facts["prompts"] == list(PROMPTS)
    assert (facts["resolution"], facts["held_out_images"]) == (32, 16)
    rows = _labelled()
    told = network(torch.stack([row["images"] for row in rows]).float() / 127.5 - 1)
    found = {
        name: float((logits.argmax(1) == torch.tensor([row[name] for row in rows])).float().mean())
        for name, logits in zip(("attribute", "prompt"), told, strict=True)
    }
    assert facts["held_out_accuracy"] == pytest.approx(found)
    assert found["attribute"] > 0.8


def test_classes_that_nobody_names_are_asked_for() -> None:
    with pytest.raises(InvDiffError, match="attributes: none are named"):
        _trainer(max_steps=1).fit(AttributeClassifier(PROMPTS), _loader(_labelled()))


def test_two_classifiers_train_on_images_and_samples_in_memory() -> None:
    rows = [{name: row[name] for name in ("images", "prompt")} for row in _labelled()]
    samples = PromptedImages(_images(4), list(PROMPTS) * 2)
    module = AugmentedClassifier(samples, PROMPTS, generated_share=0.25)
    _trainer(max_steps=3).fit(module, _loader(rows, batch_size=8))
    assert module.networks is not None
    real, augmented = (module.networks[name].state_dict() for name in ("real", "augmented"))
    assert any(not torch.equal(real[name], value) for name, value in augmented.items())
    with pytest.raises(InvDiffError, match="samples of 'a photo of a pilot', which is none of"):
        _trainer(max_steps=1).fit(AugmentedClassifier(samples, PROMPTS[:1]), _loader(rows))


def test_an_autoencoder_is_written_with_the_scale_of_its_latents(tmp_path) -> None:
    images = _images()
    sizes = Architecture()
    module = Autoencoder(PROMPTS, sizes)
    save = SavePipeline(str(tmp_path))
    loader = _loader([{"images": image} for image in images], batch_size=8)
    _trainer(LatentScale(images), save, max_steps=2).fit(module, loader)
    pipeline = load_pipeline(str(tmp_path / "pipeline"))
    with torch.no_grad():
        latents = pipeline.vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    assert pipeline.vae.config.scaling_factor == pytest.approx(float(1 / latents.std()), rel=1e-4)
    small = _loader([{"images": image[:, :16, :16]} for image in images], batch_size=8)
    with pytest.raises(InvDiffError, match="resolution=16 of the data and architecture"):
        _trainer(max_steps=1).fit(Autoencoder(PROMPTS, sizes), small)
