"""A report from a run folder made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from run_folder import METRICS, scale_figures, write_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from invdiff_pl.cli.main import main
from invdiff_pl.data.samples import read_manifest
from invdiff_pl.report.curves import pareto_front, read_scalars
from invdiff_pl.report.plots import LABEL_WIDTH
from invdiff_pl.report.run import write_report
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_file


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run that has everything but a report."""
    write_run(tmp_path)
    return tmp_path


def test_the_report_holds_the_figures_of_the_stages(run_dir: Path) -> None:
    report = write_report(run_dir, seed=3)
    assert json.loads((run_dir / "report" / "report.json").read_text()) == report
    assert report["bias"]["before"]["mean"] == 0.94
    assert report["bias"]["after"]["mean"] == 0.08
    assert report["prompt_accuracy"]["after"] == 0.98
    assert report["frechet_distance"]["after"] == 420.0
    assert report["environments"]["auc"] == 0.9876
    assert report["seconds"] == {"adapter": 30.5, "samples": 12.0, "total": 42.5}
    assert report["recall"]["before"] == 0.94
    assert report["recall"]["after"] == 0.08
    assert report["recall"]["neighbours"] == 3
    assert report["clip_t"]["before"] is None
    assert report["clip_t"]["reason"]


def test_the_table_shows_them_with_intervals_and_escapes_prompts(run_dir: Path) -> None:
    write_report(run_dir, seed=3)
    text = (run_dir / "report" / "report.md").read_text()
    assert "| 0.900 [0.860, 0.940] | 0.940 [0.900, 0.980] | 0.080 [0.040, 0.120] |" in text
    assert "efficientnet_lite0" in text
    assert "0.9876" in text
    assert "a \\| strange" in text


def test_the_page_holds_figures_pictures_and_escaped_prompts(run_dir: Path) -> None:
    sheets = run_dir / "environments" / "candidate-0"
    sheets.mkdir()
    Image.new("RGB", (8, 8), "blue").save(sheets / "sheet-0 <b>.png")
    write_report(run_dir, seed=3)
    page = (run_dir / "report" / "report.html").read_text()
    assert ">0.080 [0.040, 0.120]</td>" in page
    assert "a | strange &lt;prompt&gt;" in page
    assert page.count("data:image/png;base64,") == 4  # bias, grid, scores, sheet
    assert "<script" not in page
    assert "sheet-0%20%3Cb%3E.png" in (run_dir / "report" / "report.md").read_text()


def test_figures_without_weights_are_listed_with_the_reason_and_never_replaced(
    run_dir: Path,
) -> None:
    report = write_report(run_dir, seed=3)
    assert report["distances"]["fid"] == {"before": None, "after": None, "reason": "no weights"}
    assert report["distances"]["cmmd"]["after"] == 4.2
    text = (run_dir / "report" / "report.md").read_text()
    assert "| FID | no weights |" in text
    assert "| CLIP-T | no CLIP model |" in text
    assert "| CMMD (clip) |  | 4.50 | 4.20 |" in text


def test_curves_and_several_scales_are_drawn(run_dir: Path) -> None:
    logger = TensorBoardLogger(run_dir, name="tensorboard", version="adapter")
    for step in range(3):
        figures = {"train/mean_risk": 1.0 / (step + 1), "bias/background": 0.9 - step / 10}
        logger.log_metrics(figures, step)
    logger.finalize("success")
    metrics = json.loads(json.dumps(METRICS))
    metrics["scales"]["0.5"] = scale_figures(0.5, 0.99, 430.0)
    (run_dir / "samples" / "metrics.json").write_text(json.dumps(metrics))
    (run_dir / "sweep").mkdir()
    Image.new("RGB", (8, 8), "blue").save(run_dir / "sweep" / "sweep.png")
    write_report(run_dir, seed=3)
    assert "(../sweep/sweep.png)" in (run_dir / "report" / "report.md").read_text()
    for name in ("curves", "pareto"):
        assert min(Image.open(run_dir / "report" / f"{name}.png").size) > 100
        assert f"({name}.png)" in (run_dir / "report" / "report.md").read_text()
    steps, values = read_scalars(run_dir / "tensorboard" / "adapter")["bias/background"]
    assert steps.tolist() == [0, 1, 2]
    assert values.tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_settings_and_final_figures_are_in_the_event_files(run_dir: Path) -> None:
    logged = run_dir / "tensorboard" / "adapter" / "hparams.yaml"
    logged.parent.mkdir(parents=True)
    logged.write_text("lambda_: 3.0\nschedule: {kind: cosine, ends: [a, b]}\noutput: x\n")
    for _ in range(2):  # the second report replaces the first one's
        write_report(run_dir, seed=3)
    events = EventAccumulator(str(run_dir / "tensorboard" / "result"))
    events.Reload()
    found = {
        tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found["final/bias/background_after"] == pytest.approx([0.08])
    assert found["final/frechet_distance"] == [420.0]
    assert "final/clip_t" not in found
    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    settings = start.session_start_info.hparams
    assert settings["adapter/lambda_"].number_value == 3.0
    assert settings["adapter/schedule/ends"].string_value == "a, b"
    assert settings["adapter/rank"].number_value == 2
    assert "adapter/output" not in settings
    shown = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    tags = [metric.name.tag for metric in shown.metric_infos]
    assert set(tags) == set(found)
    assert tags[0] == "final/bias/background_after"


def test_the_front_holds_the_points_that_none_beats() -> None:
    names = {"a": (1.0, 0.9), "b": (2.0, 0.5), "c": (2.5, 0.6), "d": (3.0, 0.1), "e": (1.0, 0.95)}
    points = [{"label": n, "distance": d, "bias": b} for n, (d, b) in names.items()]
    assert [point["label"] for point in pareto_front(points)] == ["a", "b", "d"]


def test_worst_group_accuracy_is_told_only_for_the_samples_it_was_measured_on(
    run_dir: Path,
) -> None:
    group = {"worst_group": 0.6, "worst_group_interval": [0.5, 0.7], "mean": 0.9}
    group["worst_group_name"] = "raven, water"
    found = {"real": group, "augmented": group}
    folder = run_dir / "augmentation"
    folder.mkdir()
    for digest, told in ((digest_file(run_dir / "samples" / "metrics.json"), True), ("x", False)):
        (folder / "augmentation.json").write_text(json.dumps({**found, "samples": digest}))
        assert ("augmentation" in write_report(run_dir, seed=3)) == told
        assert ("raven, water" in (run_dir / "report" / "report.md").read_text()) == told


def test_a_weak_classifier_is_warned_of_beside_the_figures(run_dir: Path) -> None:
    write_report(run_dir, seed=3)
    assert "Warning" not in (run_dir / "report" / "report.md").read_text()
    weak = {**METRICS, "classifier": {"attribute": 0.503, "prompt": 0.99}}
    (run_dir / "samples" / "metrics.json").write_text(json.dumps(weak))
    write_report(run_dir, seed=3)
    text = (run_dir / "report" / "report.md").read_text()
    assert "right on only 50.3 % (attribute), so do not trust figures" in text


def test_without_labels_every_figure_is_null_with_the_reason(run_dir: Path) -> None:
    names = ("scales", "data", "classifier", "frechet_distance")
    unscored = {**dict.fromkeys(names), "samples_per_prompt": 2, "reason": "no labels in birds"}
    (run_dir / "samples" / "metrics.json").write_text(json.dumps(unscored))
    report = write_report(run_dir, seed=3)
    for figure in ("bias", "prompt_accuracy", "frechet_distance", "recall", "clip_t"):
        assert report[figure]["before"] is report[figure]["after"] is None
        assert report[figure]["reason"] == "no labels in birds"
    text = (run_dir / "report" / "report.md").read_text()
    assert "**Not scored:** no labels in birds." in text
    assert "Adapter: lora" in text
    assert not (run_dir / "report" / "bias.png").exists()


def test_the_grid_shows_before_above_after_for_each_prompt(run_dir: Path) -> None:
    write_report(run_dir, seed=3)
    picture = np.asarray(Image.open(run_dir / "report" / "grid.png"))
    assert (picture[:, :LABEL_WIDTH] < 128).any()  # there is text
    grid = picture[:, LABEL_WIDTH:]
    assert grid.shape == (4 * 64 + 6, 2 * 64, 3)
    assert grid[10, 10, 0] == 10
    assert grid[10, 70, 0] == 11
    assert grid[74, 10, 0] == 200
    assert grid[144, 10, 0] == 12
    assert grid[208, 70, 0] == 203


def test_the_calibrated_scale_and_the_shares_it_rests_on_stand_in_the_report(run_dir: Path) -> None:
    measured = [
        {"scale": 1.0, "shares": [[0.6, 0.4], [0.5, 0.5]]},
        {"scale": 1.5, "shares": [[0.4, 0.6], [0.5, 0.5]]},
    ]
    told = {"scale": 1.25, "samples": 64, "measured": measured}
    (run_dir / "adapter" / "calibration.json").write_text(json.dumps(told))
    assert write_report(run_dir, seed=3)["calibration"] == told
    text = (run_dir / "report" / "report.md").read_text()
    assert "| 1.00 | 0.550 | 0.450 |" in text
    assert "| 1.50 | 0.450 | 0.550 |" in text
    assert "multiplied by **1.250**" in text
    assert "Warning" not in text
    (run_dir / "adapter" / "calibration.json").write_text(json.dumps({**told, "warning": "look"}))
    write_report(run_dir, seed=3)
    assert "**Warning**: look." in (run_dir / "report" / "report.md").read_text()


def test_held_out_risks_and_their_bound_stand_in_the_report(run_dir: Path) -> None:
    write_report(run_dir, seed=3)
    assert (
        "Not measured: the adapter stage measured no held-out risks"
        in (run_dir / "report" / "report.md").read_text()
    )
    before = {"mean": 0.5, "worst": 0.75, "bound": 0.8}
    after = {"mean": 0.25, "worst": 0.3, "bound": 0.35}
    held = {
        "selection": {"chosen_step": 300, "candidates": [{"step": 0}, {"step": 300}]},
        "bins": [{"from": 900, "to": 999, "before": before, "after": after}],
    }
    (run_dir / "adapter" / "heldout.json").write_text(json.dumps(held))
    assert write_report(run_dir, seed=3)["held_out"] == held
    text = (run_dir / "report" / "report.md").read_text()
    assert "| 900–999 | 0.5000 | 0.2500 | 0.7500 | 0.3000 | 0.8000 | 0.3500 |" in text
    assert "Step 300 is kept of steps 0, 300:" in text
    assert "Nothing was trained" not in text
    adapter = json.loads((run_dir / "adapter" / "adapter" / "adapter.json").read_text())
    adapter |= {"trained": False, "reason": "no bias found"}
    (run_dir / "adapter" / "adapter" / "adapter.json").write_text(json.dumps(adapter))
    write_report(run_dir, seed=3)
    text = (run_dir / "report" / "report.md").read_text()
    assert "**Nothing was trained:** no bias found. Before and after are the same." in text


def test_plots_are_written(run_dir: Path) -> None:
    write_report(run_dir, seed=3)
    for name in ("bias.png", "scores.png"):
        image = Image.open(run_dir / "report" / name)
        assert min(image.size) > 100


def test_the_command_tells_which_stage_is_missing(run_dir: Path, capsys) -> None:
    (run_dir / "samples" / "metrics.json").unlink()
    assert main(["report", "--run-dir", str(run_dir)]) == 2
    message = capsys.readouterr().err
    assert "metrics.json is missing" in message
    assert message.count("\n") == 1


def test_a_damaged_manifest_is_named_with_its_line(run_dir: Path) -> None:
    path = run_dir / "samples" / "manifest.jsonl"
    path.write_text(path.read_text() + "{half a li\n")
    with pytest.raises(InvDiffError, match="line 9 is damaged"):
        read_manifest(run_dir / "samples")


def test_recall_of_too_few_images_is_left_out_with_its_reason(run_dir: Path) -> None:
    metrics = json.loads(json.dumps(METRICS))
    for figures in metrics["scales"].values():
        figures["manifold"] = {"reason": "too few"}
    (run_dir / "samples" / "metrics.json").write_text(json.dumps(metrics))
    report = write_report(run_dir, 0)
    assert report["recall"] == {"before": None, "after": None, "reason": "too few"}
    assert "Recall" not in (run_dir / "report" / "report.md").read_text()
