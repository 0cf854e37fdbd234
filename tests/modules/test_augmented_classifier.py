"""Two classifiers of the prompt: on real images, and on real and debiased ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule
from trainers import quiet_trainer

from invdiff_pl.callbacks import GroupAccuracy, SaveClassifier
from invdiff_pl.callbacks.group_accuracy import group_figures
from invdiff_pl.data.images import read_images, to_float
from invdiff_pl.data.samples import Sample, manifest_text, sample_file
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.modules import AttributeClassifier, AugmentedClassifier
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_file, read_json

COLOURS = ("red", "lime", "blue", "yellow", "white")


@pytest.fixture
def samples(module_of, tmp_path: Path) -> Path:
    """Two samples of each prompt: grey before, of a colour of its own after."""
    folder = tmp_path / "samples"
    drawn = []
    for number, prompt in enumerate(module_of().prompts):
        for scale in (0.0, 1.0):
            for index in (2 * number, 2 * number + 1):
                file = sample_file(scale, index)
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                colour = COLOURS[number] if scale else "grey"
                Image.new("RGB", (32, 32), colour).save(folder / file)
                drawn.append(Sample(str(file), index, prompt, number, scale, 0, 1.0, 1, "DDIM"))
    (folder / "manifest.jsonl").write_text(manifest_text(drawn))
    (folder / "metrics.json").write_text("{}")
    return folder


def _train(module: LightningModule, data, folder: Path, steps: int, **settings: Any) -> None:
    save = GroupAccuracy if isinstance(module, AugmentedClassifier) else SaveClassifier
    trainer = quiet_trainer(folder, max_steps=steps, callbacks=[save(str(folder))], **settings)
    trainer.fit(module, datamodule=data)


def test_both_are_tested_in_every_group_and_only_one_learns_the_samples(
    module_of, samples, tmp_path
) -> None:
    data = module_of(content="images", batch_size=20)
    module = AugmentedClassifier(str(samples), learning_rate=0.01)
    _train(module, data, tmp_path, steps=30)
    found = read_json(tmp_path / "augmentation.json")
    prompts, attributes = data.labels("test")
    cells = (prompts * 2 + attributes).bincount(minlength=10)
    for name in ("real", "augmented"):
        groups = found[name]["per_group"]
        assert [group["images"] for group in groups.values()] == cells[cells > 0].tolist()
        assert found[name]["worst_group"] == min(group["accuracy"] for group in groups.values())
    assert found["generated_images"] == 10  # of the highest scale alone
    assert found["samples"] == digest_file(samples / "metrics.json")
    assert module.networks is not None
    files = [samples / sample_file(1.0, 2 * number) for number in range(5)]
    told = {
        name: network.eval()(to_float(read_images(files, 32)))[1].argmax(1).tolist()
        for name, network in module.networks.items()
    }
    right = {name: sum(n == i for i, n in enumerate(found)) for name, found in told.items()}
    assert right["augmented"] >= 4 > right["real"]


def test_both_start_from_the_same_weights(module_of, samples, tmp_path) -> None:
    module = AugmentedClassifier(str(samples), learning_rate=0.0)
    _train(module, module_of(content="images", batch_size=4), tmp_path, steps=1)
    assert module.networks is not None
    real, augmented = (dict(module.networks[name].named_parameters()) for name in module.networks)
    assert all(torch.equal(real[name], value) for name, value in augmented.items())


def test_the_worst_group_is_named_and_empty_groups_are_left_out() -> None:
    counts = torch.tensor([[[1, 9], [0, 0]], [[6, 4], [0, 5]]])
    found = group_figures(counts, ("swan", "raven"), ("land", "water"))
    assert found["worst_group_name"] == "raven, land"
    assert found["worst_group"] == 0.4
    assert found["mean"] == pytest.approx((0.9 + 0.4 + 1) / 3)
    assert "swan, water" not in found["per_group"]
    low, high = found["worst_group_interval"]
    assert low < 0.4 < high


def test_samples_of_other_prompts_and_impossible_shares_are_refused(
    module_of, samples, tmp_path
) -> None:
    manifest = samples / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    changed = [json.dumps({**line, "prompt": "a photo of a dodo"}) for line in lines]
    manifest.write_text("\n".join(changed) + "\n")
    module = AugmentedClassifier(str(samples))
    with pytest.raises(InvDiffError, match=r"a photo of a dodo.*rerun the samples stage"):
        _train(module, module_of(content="images"), tmp_path, steps=1)
    with pytest.raises(InvDiffError, match=r"generated_share=1\.5: expected a share between"):
        AugmentedClassifier(str(samples), generated_share=1.5)


def test_the_scoring_classifier_tells_its_confusions(module_of, tmp_path) -> None:
    data = module_of(content="labelled_images", batch_size=20)
    _train(AttributeClassifier(), data, tmp_path, steps=2, val_check_interval=2)
    _, facts = SampleClassifier.load(tmp_path / "classifier")
    confusion = torch.tensor(facts["held_out_confusion"]["attribute"])
    _, attributes = data.labels("test")
    assert confusion.sum(1).tolist() == attributes.bincount(minlength=2).tolist()
    accuracy = confusion.trace() / confusion.sum()
    assert facts["held_out_accuracy"]["attribute"] == pytest.approx(accuracy.item())
