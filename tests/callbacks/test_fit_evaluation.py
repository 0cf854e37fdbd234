"""Quick looks during training: what they log, and that they leave training alone."""

import csv
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from trainers import quiet_trainer

from invdiff_pl.callbacks import (
    Dashboard,
    ExponentialMovingAverage,
    FitEvaluation,
    SampleGrid,
)
from invdiff_pl.callbacks.live import live_pipeline
from invdiff_pl.metrics.settings import EvaluationSettings
from invdiff_pl.modules import InvariantAdapter

SCORING = EvaluationSettings(resolution=32)


def _train(folder: Path, module_of, backbone: Path, environments: Path, callbacks: list) -> dict:
    module = InvariantAdapter(str(backbone), learning_rate=0.01, warmup_steps=1)
    board = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    logger = [board, CSVLogger(folder, name="csv", version="")]
    callbacks = [ExponentialMovingAverage(0.5), *callbacks]
    trainer = quiet_trainer(
        folder, callbacks=callbacks, logger=logger, max_steps=4, log_every_n_steps=1
    )
    trainer.fit(module, datamodule=module_of(environments=str(environments), batch_size=8))
    return {name: value.detach().clone() for name, value in module.trainable_parameters().items()}


@pytest.fixture(scope="module")
def looked_at(
    module_of, tiny_backbone, environments, classifier, tmp_path_factory
) -> tuple[Path, dict]:
    """A training run with every watching callback, and its weights."""
    folder = tmp_path_factory.mktemp("looked-at")
    look = FitEvaluation(str(classifier), SCORING, every_n_steps=2, samples_per_prompt=3, steps=1)
    callbacks = [look, Dashboard(), SampleGrid(every_n_steps=2, columns=2, steps=1)]
    return folder, _train(folder, module_of, tiny_backbone, environments, callbacks)


@pytest.fixture(scope="module")
def events(looked_at) -> EventAccumulator:
    accumulator = EventAccumulator(str(looked_at[0]))
    accumulator.Reload()
    return accumulator


def test_watching_does_not_change_what_is_trained(
    looked_at, module_of, tiny_backbone, environments, tmp_path
) -> None:
    alone = _train(tmp_path, module_of, tiny_backbone, environments, [])
    assert alone.keys() == looked_at[1].keys()
    assert all(torch.equal(alone[name], value) for name, value in looked_at[1].items())


def test_bias_and_quality_are_logged_at_every_look(events) -> None:
    tags = events.Tags()["scalars"]
    for tag in ("bias/background", "val/samples/prompt_accuracy", "val/samples/frechet_distance"):
        assert [event.step for event in events.Scalars(tag)] == [0, 2, 4]
    ends = ("bias/background", "interval/background_low", "interval/background_high")
    value, low, high = (events.Scalars(tag)[0].value for tag in ends)
    assert 0 <= low <= value <= high <= 1
    assert {"train/mean_risk", "train/risk_variance", "train/risk/environment_0"} <= set(tags)
    assert [event.step for event in events.Images("samples/grid")] == [0, 2, 4]


def test_every_logger_has_the_figures_of_a_look(looked_at) -> None:
    with (looked_at[0] / "csv" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("bias/background")]
    assert [int(row["step"]) for row in rows] == [0, 2, 4]


def test_the_layout_names_tags_that_are_there(events) -> None:
    content = events.PluginTagToContent("custom_scalars")
    assert list(content) == ["custom_scalars__config__"]
    tensor = events.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = Layout.FromString(tensor.string_val[0])
    assert [category.title for category in layout.category] == ["loss", "bias and quality"]
    present = set(events.Tags()["scalars"])
    (bias, *_) = layout.category[1].chart
    (band,) = bias.margin.series
    assert {band.value, band.lower, band.upper} <= present
    charts = [chart for category in layout.category for chart in category.chart]
    tags = {tag for chart in charts for tag in chart.multiline.tag}
    tags |= {series.value for chart in charts for series in chart.margin.series}
    assert {"train/mean_risk", "train/risk_variance", "val/samples/frechet_distance"} <= tags


def test_environment_scores_are_there_as_histograms(events) -> None:
    assert {"environments/scores", "environments/scores_of_0", "environments/scores_of_1"} <= set(
        events.Tags()["histograms"]
    )
    whole, *parts = (
        events.Histograms(f"environments/scores{part}")[0].histogram_value.num
        for part in ("", "_of_0", "_of_1")
    )
    assert whole == sum(parts) > 0


def test_without_a_classifier_it_says_so_in_one_line_and_goes_on(
    module_of, tiny_backbone, environments, tmp_path, capsys
) -> None:
    look = FitEvaluation(str(tmp_path / "none"), SCORING, samples_per_prompt=1, steps=1)
    _train(tmp_path, module_of, tiny_backbone, environments, [look])
    lines = [line for line in capsys.readouterr().out.splitlines() if "not scored" in line]
    assert len(lines) == 1
    assert "classifier.json is missing" in lines[0]
    assert look.figures == {}


def test_the_live_pipeline_is_the_modules_own_and_is_given_back_as_it_was(tiny_backbone) -> None:
    module = InvariantAdapter(str(tiny_backbone))
    average = ExponentialMovingAverage(0.5)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[average])
    average._start(module)
    weights = {
        name: value.detach().clone() for name, value in module.trainable_parameters().items()
    }
    module.denoiser.train()
    for value in module.trainable_parameters().values():
        value.data += 1  # the average stays behind
    with live_pipeline(trainer, module) as pipeline:
        assert pipeline is module.pipeline
        assert not pipeline.unet.training
        drawing = {name: value.clone() for name, value in module.trainable_parameters().items()}
    assert all(torch.equal(drawing[name], value) for name, value in weights.items())
    assert module.denoiser.training
    left = module.trainable_parameters()
    assert all(torch.equal(left[name], value + 1) for name, value in weights.items())
