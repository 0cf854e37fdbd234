"""The same figures on one, two and three ranks, of 25 samples that divide by neither 2 nor 3."""

from typing import Any

import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from trainers import quiet_trainer

from invdiff_pl.callbacks import FitEvaluation, SampleEvaluation
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.modules import Backbone, ConditionalSampler
from invdiff_pl.report.curves import read_scalars
from invdiff_pl.utils.files import read_json

SCORING = EvaluationSettings(resolution=32)


@pytest.fixture(scope="module")
def figures(
    module_of, classifier, weights, tiny_backbone, tmp_path_factory
) -> dict[int, dict[str, Any]]:
    """``metrics.json``, of every figure but FID, by the number of ranks that wrote it."""
    scoring = EvaluationSettings(
        resolution=32,
        clip=str(weights / "clip"),
        dinov2=str(weights / "dinov2"),
        second_classifier=str(classifier),
    )
    found = {}
    for ranks in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        data = module_of(content="prompts", samples_per_prompt=5, batch_size=4)
        module = ConditionalSampler(str(tiny_backbone), steps=1)
        callback = SampleEvaluation(str(folder), str(classifier), scoring)
        trainer = quiet_trainer(folder, ranks, callbacks=[callback])
        trainer.predict(module, datamodule=data, return_predictions=False)
        found[ranks] = read_json(folder / "metrics.json")
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_counts_are_the_same_on_any_number_of_ranks(figures, ranks: int) -> None:
    one, several = (figures[number]["scales"]["0.0"] for number in (1, ranks))
    counts = [entry["counts"] for entry in one["bias"]["per_prompt"].values()]
    assert sum(sum(entry.values()) for entry in counts) == 25
    assert several["bias"] == one["bias"]
    assert several["prompt_accuracy"] == one["prompt_accuracy"]
    assert several["intersection"] == one["intersection"]
    assert figures[ranks]["data"] == figures[1]["data"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_distances_are_the_same_on_any_number_of_ranks(figures, ranks: int) -> None:
    one, several = (figures[number]["scales"]["0.0"] for number in (1, ranks))
    # Features are float32 and may be summed in another order in batches of another size.
    assert several["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-5)
    assert several["manifold"] == pytest.approx(one["manifold"], abs=1e-12)
    measured = {name: value for name, value in one["distances"].items() if name != "fid"}
    assert measured.keys() == {"fd_dinov2", "cmmd"}
    for name, value in measured.items():
        assert several["distances"][name] == pytest.approx(value, rel=1e-5)
    assert several["clip_t"]["mean"] == pytest.approx(one["clip_t"]["mean"], rel=1e-5)
    assert several["clip_t"]["per_prompt"] == pytest.approx(one["clip_t"]["per_prompt"], rel=1e-5)


def test_a_look_during_training_is_the_same_on_two_and_three_ranks(
    module_of, classifier, tiny_backbone, tmp_path
) -> None:
    found = {}
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        look = FitEvaluation(str(classifier), SCORING, samples_per_prompt=5, steps=1, batch_size=4)
        logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
        module = Backbone(str(tiny_backbone), learning_rate=0.0)
        trainer = quiet_trainer(folder, ranks, logger=logger, callbacks=[look], max_steps=1)
        trainer.fit(module, datamodule=module_of(batch_size=8))
        scalars = read_scalars(folder)
        found[ranks] = {
            tag: values.tolist()
            for tag, (_, values) in scalars.items()
            if tag.startswith(("bias/", "interval/", "val/"))
        }
    assert len(found[1]["bias/background"]) == 2  # before the step and after it
    for ranks in (2, 3):
        assert found[ranks].keys() == found[1].keys()
        for tag, values in found[1].items():
            assert found[ranks][tag] == pytest.approx(values, rel=1e-4)
