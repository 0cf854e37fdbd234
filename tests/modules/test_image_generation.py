"""Images that the frozen model draws of prompts to be debiased on: how many, which, resumed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import quiet_trainer

from invdiff_pl.callbacks import SaveClassifier, SaveSamples
from invdiff_pl.callbacks.samples import FACTS
from invdiff_pl.data.generated import GeneratedDataModule
from invdiff_pl.data.samples import read_manifest
from invdiff_pl.environments.hidden_attribute import (
    HiddenAttributeSettings,
    find_hidden_attributes,
)
from invdiff_pl.modules import AttributeClassifier, ImageGeneration
from invdiff_pl.modules.image_generation import scarcity
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json

PROMPTS = "a photo of a raven; a photo of a mallard"


def data_of(backbone: Path, root: Path, cache: Path, **settings: Any) -> GeneratedDataModule:
    shared = {"backbone": str(backbone), "resolution": 32, "cache_dir": str(cache)}
    return GeneratedDataModule(prompts=PROMPTS, root=str(root), **{**shared, **settings})


def generate(
    backbone: Path, folder: Path, per_prompt: int = 6, **settings: Any
) -> GeneratedDataModule:
    """Draw, and give the DataModule that reads what was drawn."""
    images = folder / "images"
    data = data_of(
        backbone, images, folder / "cache", content="prompts", samples_per_prompt=per_prompt,
        batch_size=4,
    )  # fmt: skip
    module = ImageGeneration(str(backbone), steps=1, batch_size=4, **settings)
    trainer = quiet_trainer(folder, callbacks=[SaveSamples(str(images))])
    trainer.predict(module, datamodule=data, return_predictions=False)
    return data_of(backbone, images, folder / "cache")


def hidden(share: Callable[[int], float], monkeypatch) -> None:
    """Let features tell a hidden attribute, of that share in each prompt."""
    seen = [0, 0]

    def take(self, batch, images: Tensor) -> None:
        for index, prompt in zip(batch["index"].tolist(), batch["prompt"].tolist(), strict=True):
            rare = seen[prompt] % 100 < round(100 * share(prompt))
            seen[prompt] += 1
            noise = torch.randn(6, generator=torch.Generator().manual_seed(index))
            value = (1 - rare) if prompt else rare
            self._found[index] = (prompt, noise + 8 * value * torch.eye(6)[0] + prompt)

    few = HiddenAttributeSettings(starts=10, values=())
    search = partial(find_hidden_attributes, settings=few)
    monkeypatch.setattr("invdiff_pl.modules.image_generation.find_hidden_attributes", search)
    monkeypatch.setattr(ImageGeneration, "_take_features", take)


def test_images_of_each_prompt_are_drawn_and_read_as_a_data_set(tiny_backbone, tmp_path) -> None:
    data = generate(tiny_backbone, tmp_path, least_rare=0)
    assert data.prompts == ("a photo of a mallard", "a photo of a raven")
    assert len(data.index) == 12
    assert data.train_prompts().bincount().tolist() == [6, 6]
    assert data.attributes() is None
    data.prepare_data()
    assert len(data.moments()) == 12
    told = read_json(tmp_path / "images" / FACTS)
    assert told["counts"] == [6, 6]
    drawn = read_manifest(tmp_path / "images")
    assert {sample.seed for sample in drawn} == {-1}  # no noise is that of a sample to be scored


def test_images_are_drawn_more_clearly_unless_guidance_was_as_strong_from_the_start(
    tiny_backbone, tmp_path
) -> None:
    settings = {
        "plain": (1.0, 1.0),
        "clearer": (1.0, 3.0),
        "guided": (3.0, 1.0),
        "both": (3.0, 3.0),
    }
    drawn = {}
    for name, (guidance_scale, clearer) in settings.items():
        chosen = {"guidance_scale": guidance_scale, "clearer": clearer}
        data = generate(tiny_backbone, tmp_path / name, per_prompt=1, least_rare=0, **chosen)
        drawn[name] = [(data.root / file).read_bytes() for file in data.index.files]
    assert all(a != b for a, b in zip(drawn["plain"], drawn["clearer"], strict=True))
    assert drawn["guided"] == drawn["both"]


def test_no_classifier_is_trained_on_images_that_nobody_has_labelled(
    tiny_backbone, tmp_path
) -> None:
    drawn = generate(tiny_backbone, tmp_path, per_prompt=1, least_rare=0)
    data = data_of(tiny_backbone, drawn.root, tmp_path / "cache", content="labelled_images")
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[SaveClassifier(str(tmp_path))])
    trainer.fit(AttributeClassifier(), datamodule=data)
    told = read_json(tmp_path / "classifier" / "classifier.json")
    assert told == {"absent": data.why_not_scored}


def test_more_is_drawn_of_prompts_whose_rarer_group_has_few_images(
    tiny_backbone, tmp_path, monkeypatch
) -> None:
    hidden(lambda prompt: (0.05, 0.2)[prompt], monkeypatch)
    data = generate(tiny_backbone, tmp_path, per_prompt=100, least_rare=10)
    told = read_json(tmp_path / "images" / FACTS)
    counts = data.train_prompts().bincount().tolist()
    assert told["counts"] == counts
    assert told["verdict"] == "bias"
    assert counts[1] == 100  # 20 are there
    assert 200 <= counts[0] <= 230  # 5 of the first 100 call for 220
    assert min(told["rarer"]) >= 10
    assert told["warnings"] == []
    files = [tmp_path / "images" / sample.file for sample in read_manifest(tmp_path / "images")]
    assert len(set(files)) == sum(counts)
    assert all(file.is_file() for file in files)


def test_drawing_more_stops_at_a_bound_and_tells_by_how_much_more_might_help(
    tiny_backbone, tmp_path, monkeypatch, capsys
) -> None:
    hidden(lambda prompt: (0.05, 0.2)[prompt], monkeypatch)
    generate(tiny_backbone, tmp_path, per_prompt=100, least_rare=15, most_per_prompt=120)
    told = read_json(tmp_path / "images" / FACTS)
    assert told["counts"] == [120, 100]
    rarer = told["rarer"][0]
    expected = f"'a photo of a mallard': {rarer} of 120 images are of its rarer group; about "
    assert told["warnings"][0].startswith(expected)
    assert f"warning: {expected}" in capsys.readouterr().out


def test_a_prompt_of_one_group_is_told_with_the_most_that_the_other_can_be() -> None:
    (line,) = scarcity(("a nurse", "a pilot"), [3000, 500], [0, 40], 32)
    assert "'a nurse' shows only one group in 3000 images" in line
    assert "in less than 0.001 of the images (95 %): more than 32000 images would be needed" in line
    assert scarcity(("a nurse",), [512], None, 32) == []


def test_an_interrupted_generation_goes_on_to_the_same_images(
    tiny_backbone, tmp_path, monkeypatch
) -> None:
    whole = generate(tiny_backbone, tmp_path / "whole", least_rare=0)
    original = ImageGeneration.predict_step

    def interrupted(self, batch, batch_idx):
        if batch_idx == 2:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ImageGeneration, "predict_step", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        generate(tiny_backbone, tmp_path / "cut", least_rare=0)
    monkeypatch.undo()
    first = next((tmp_path / "cut" / "images" / "scale-0.00").glob("000000.png"))
    written = first.stat().st_mtime_ns
    again = generate(tiny_backbone, tmp_path / "cut", least_rare=0)
    assert first.stat().st_mtime_ns == written
    for file in whole.index.files:
        assert (whole.root / file).read_bytes() == (again.root / file).read_bytes()


@pytest.mark.parametrize(("prompts", "each"), [(2, 1500), (5, 600), (6, 512), (40, 512)])
def test_few_prompts_are_drawn_until_there_are_3000_images(prompts: int, each: int) -> None:
    texts = "; ".join(f"a photo of number {number}" for number in range(prompts))
    given: dict[str, Any] = {"prompts": texts, "root": "", "backbone": "", "resolution": 32}
    drawn = GeneratedDataModule(**given)
    assert (drawn.per_prompt, drawn.samples_per_prompt) == (each, each)
    samples = GeneratedDataModule(**given, per_prompt=7, samples_per_prompt=20)
    assert (samples.per_prompt, samples.samples_per_prompt) == (7, 20)


def test_images_of_other_prompts_and_settings_out_of_range_are_refused(
    tiny_backbone, tmp_path
) -> None:
    generate(tiny_backbone, tmp_path, per_prompt=1, least_rare=0)
    other = GeneratedDataModule(
        prompts="a photo of a swan", root=str(tmp_path / "images"), backbone="", resolution=32
    )
    with pytest.raises(
        InvDiffError, match="holds images of other prompts, such as 'a photo of a mallard'"
    ):
        other.read_index()
    with pytest.raises(InvDiffError, match="per_prompt=0"):
        data_of(tiny_backbone, tmp_path, tmp_path, per_prompt=0)
