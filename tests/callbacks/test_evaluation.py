"""What samples are scored against, and the figures of a perfect and a one-sided sampler."""

from pathlib import Path

import pytest
import torch
from trainers import quiet_trainer

from invdiff_pl.callbacks.evaluation import SampleEvaluation
from invdiff_pl.data.waterbirds import WaterbirdsDataModule
from invdiff_pl.metrics import BiasScore
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.metrics.reference import balanced_rows, reference_features, reference_rows
from invdiff_pl.metrics.sample_scores import bias_figures
from invdiff_pl.metrics.scorers import encoder_identity
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.modules import ConditionalSampler
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json


def test_the_balanced_set_has_equally_many_of_each_cell() -> None:
    prompts = torch.tensor([0] * 10 + [1] * 10)
    attributes = torch.tensor([0] * 7 + [1] * 3 + [0] * 2 + [1] * 8)
    rows = balanced_rows(prompts, attributes)
    cells = (prompts * 2 + attributes)[rows]
    assert cells.bincount().tolist() == [2, 2, 2, 2]
    assert rows.tolist() == [0, 1, 7, 8, 10, 11, 12, 13]


def test_prompts_without_every_attribute_are_left_out_of_the_balanced_set() -> None:
    prompts = torch.tensor([0, 0, 1, 1])
    attributes = torch.tensor([0, 1, 0, 0])
    assert balanced_rows(prompts, attributes).tolist() == [0, 1]
    with pytest.raises(InvDiffError, match="no balanced set"):
        balanced_rows(prompts, torch.tensor([0, 0, 1, 1]))


def test_figures_hold_counts_by_class_name() -> None:
    score = BiasScore(1, 2)
    score.update(torch.zeros(10, dtype=torch.int64), torch.tensor([0] * 9 + [1]))
    figures = bias_figures(score, ("a photo of a swan",), ("land", "water"))
    prompt = figures["per_prompt"]["a photo of a swan"]
    assert prompt["counts"] == {"land": 9, "water": 1}
    assert figures["mean"] == pytest.approx(0.8)
    assert figures["interval"][0] <= 0.8 <= figures["interval"][1]


def test_samples_are_scored_while_they_are_drawn(birds, tiny_backbone, tmp_path, capsys) -> None:
    data = WaterbirdsDataModule(
        root=str(birds),
        backbone=str(tiny_backbone),
        resolution=32,
        cache_dir=str(tmp_path / "cache"),
        content="prompts",
        samples_per_prompt=4,
        batch_size=7,
    )
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    network = SampleClassifier(attributes=2, prompts=6)
    with torch.no_grad():
        network.attribute_head.weight.zero_()
        network.attribute_head.bias.copy_(torch.tensor([0.0, 9.0]))  # sees water everywhere
        network.prompt_head.weight.zero_()
        network.prompt_head.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0]))
    facts = {
        "prompts": list(data.prompts),
        "held_out_accuracy": {"attribute": 0.5, "prompt": 1 / 6},
    }
    network.save(classifier, facts)
    scoring = EvaluationSettings(resolution=32, clip=str(tmp_path / "no-model"))
    callback = SampleEvaluation(str(tmp_path), str(classifier), scoring)
    module = ConditionalSampler(str(tiny_backbone), steps=1)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.predict(module, datamodule=data, return_predictions=False)
    report = read_json(Path(tmp_path) / "metrics.json")
    (figures,) = report["scales"].values()
    assert figures["bias"]["mean"] == 1.0
    assert figures["bias"]["per_prompt"][data.prompts[2]]["counts"] == {"land": 0, "water": 4}
    assert figures["prompt_accuracy"]["mean"] == pytest.approx(1 / 6)
    assert figures["frechet_distance"] > 0
    assert report["data"]["bias"]["mean"] == pytest.approx(0.9, abs=0.15)
    assert report["frechet_distance"]["n"] == 24
    assert set(figures["manifold"]) == {"precision", "recall", "density", "coverage"}
    assert report["manifold"] == {"neighbours": 3}
    assert "no-model" in figures["clip_t"]["reason"]
    assert "CLIP-T (and CMMD) is left out" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["predict", "test"])
def test_given_weights_bring_figures_of_their_own_names(
    module_of, tiny_backbone, classifier, weights, tmp_path, run: str
) -> None:
    scoring = EvaluationSettings(
        resolution=32,
        clip=str(weights / "clip"),
        dinov2=str(weights / "dinov2"),
        inception=str(weights / "nowhere.pth"),
        second_classifier=str(classifier),  # the same attribute twice
        target=[0.25, 0.75],
    )
    callback = SampleEvaluation(str(tmp_path), str(classifier), scoring)
    data = module_of(content="prompts", samples_per_prompt=4, batch_size=7)
    module = ConditionalSampler(str(tiny_backbone), steps=1)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    getattr(trainer, run)(module, datamodule=data)
    report = read_json(tmp_path / "metrics.json")
    (figures,) = report["scales"].values()
    assert figures["distances"]["fd_dinov2"] > 0
    assert figures["distances"]["cmmd"] > 0
    assert -100 <= figures["clip_t"]["mean"] <= 100
    assert "nowhere.pth cannot be read" in figures["distances"]["fid"]["reason"]
    assert "evaluation.inception=" in figures["distances"]["fid"]["reason"]
    told = {name: facts["extractor"] for name, facts in report["distances"].items()}
    assert told == {"fd_dinov2": "dinov2", "cmmd": f"clip {weights / 'clip'}"}
    assert report["distances"]["fd_dinov2"]["resize"] == 224
    for both, alone in zip(
        figures["intersection"]["per_prompt"].values(),
        figures["bias"]["per_prompt"].values(),
        strict=True,
    ):
        land, water = alone["counts"].values()
        assert list(both["counts"].values()) == [land, 0, 0, water]
        share = land / 4
        assert alone["total_variation"] == pytest.approx(abs(share - 0.25))
    assert figures["bias"]["target"] == [[0.25, 0.75]] * 5
    assert 0 <= figures["bias"]["classifier_corrected"]["mean"] <= 1


def test_reference_features_are_computed_once_and_told_apart(module_of, tmp_path) -> None:
    data = module_of(cache_dir=str(tmp_path))
    rows, seen = reference_rows(data), []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images.flatten(1)[:, :7].float()

    def features(name: str, **settings) -> torch.Tensor:
        settings = {"build": True, "barrier": lambda: None, **settings}
        found = reference_features(data, rows, encode, {"name": name}, **settings)
        return found.gather(torch.arange(len(rows)))

    first = features("one")
    assert torch.equal(first, data.images("test").gather(rows).flatten(1)[:, :7].float())
    assert sum(seen) == len(rows)
    assert torch.equal(features("one"), first)
    assert torch.equal(features("one", build=False), first)
    assert sum(seen) == len(rows)
    features("another")
    assert sum(seen) == 2 * len(rows)
    with pytest.raises(InvDiffError, match="missing"):
        features("a third", build=False)


def test_encoders_are_told_apart_by_their_weights() -> None:
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert encoder_identity("a", one, 8) == encoder_identity("a", one, 8)
    assert encoder_identity("a", one, 8) != encoder_identity("a", other, 8)
    assert encoder_identity("a", one, 8) != encoder_identity("a", one, 16)
