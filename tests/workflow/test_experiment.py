"""The whole experiment on a tiny data set and an untrained backbone, as a user starts it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from child_processes import stages_in_this_process
from PIL import Image
from safetensors.torch import load_file

from invdiff_pl.cli.main import main
from invdiff_pl.utils.files import digest_file, digest_folder, read_json
from invdiff_pl.workflow import run as runner

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TINY = [
    "--render.fraction=0.02",
    "--scale.classifier_steps=3",
    "--scale.adapter_steps=6",
    "--scale.calibration_samples=12",
    "--scale.calibration_steps=2",
    "--scale.adapter_batch=12",
    "--scale.sampling_steps=2",
    "--scale.samples_per_prompt=4",
    "--scale.sampling_batch=4",
    "--evaluation.resolution=32",
    "--environments.model.settings.starts=4",
    "--environments.model.settings.values=[]",
    "--model.train_without_bias=true",
    "--experiment.cache_dir=cache",
]


def _words(backbone: Path, run_dir: str) -> list[str]:
    inputs = ["--experiment", "waterbirds", "--experiments", str(EXPERIMENTS)]
    return ["train", *inputs, "--backbone", str(backbone), "--run-dir", run_dir, *TINY]


@pytest.fixture(scope="module")
def finished(
    tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A folder in which the experiment has run."""
    folder = tmp_path_factory.mktemp("experiment")
    words = _words(tiny_backbone, "run")
    with pytest.MonkeyPatch.context() as patch, stages_in_this_process():
        patch.chdir(folder)
        assert main(words) == 0
    return folder, words


def test_the_whole_experiment_runs_to_its_report(finished) -> None:
    folder, _ = finished
    report = read_json(folder / "run" / "report" / "report.json")
    assert report["experiment"] == "waterbirds"
    assert report["bias"]["samples_per_prompt"] == 4
    assert 0 <= report["bias"]["after"]["mean"] <= 1
    assert report["adapter"]["kind"] == "lora"
    assert set(report["seconds"]) == {
        "data",
        "classifier",
        "environments",
        "adapter",
        "samples",
        "total",
    }
    assert (folder / "run" / "report" / "grid.png").is_file()
    assert list((folder / "run" / "tensorboard" / "adapter").glob("events.*"))


def test_risks_of_every_environment_and_grids_are_in_the_event_files(finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "run" / "tensorboard" / "adapter"))
    events.Reload()
    assert "samples/grid" in events.Tags()["images"]
    assert len(events.Images("samples/grid")) >= 1


def test_a_second_call_runs_nothing(finished, monkeypatch, capsys) -> None:
    folder, words = finished
    monkeypatch.chdir(folder)
    monkeypatch.setattr(runner, "run_stage", lambda *_: pytest.fail("a stage ran"))
    started = time.monotonic()
    assert main(words) == 0
    assert time.monotonic() - started < 30
    assert capsys.readouterr().out.count("up to date") == 6


def test_the_adapter_keeps_what_held_out_risks_chose(finished) -> None:
    folder, _ = finished
    held = read_json(folder / "run" / "adapter" / "heldout.json")
    assert len(held["bins"]) == 10
    assert [c["step"] for c in held["selection"]["candidates"]] == [0, 6]
    assert read_json(folder / "run" / "report" / "report.json")["held_out"] == held


def test_a_finished_run_is_swept_once_loaded_and_exported(finished, monkeypatch, capsys) -> None:
    folder, _ = finished
    monkeypatch.chdir(folder)
    words = ["sweep", "--runs", "run", "--invariant-scales", "0", "0.5", "--samples-per-prompt"]
    assert main([*words, "2", "--guidance-scales", "2"]) == 0
    points = read_json(folder / "run" / "sweep" / "sweep.json")
    scales = [(point["guidance_scale"], point["invariant_scale"]) for point in points]
    assert scales == [(1.0, 0.0), (1.0, 0.5), (2.0, 0.0), (2.0, 1.0)]
    assert all(0 <= point["bias"] <= 1 and point["frechet_distance"] > 0 for point in points)
    assert len(list((folder / "run" / "sweep" / "guidance-1.00").glob("scale-*/*.png"))) == 24
    assert (folder / "run" / "sweep" / "sweep.png").is_file()

    monkeypatch.setattr("invdiff_pl.cli.sweep.score_samples", lambda *_: pytest.fail("drew again"))
    assert main([*words, "2", "--guidance-scales", "2"]) == 0
    assert main(["export", "--run-dir", "run", "--output", "exported"]) == 0
    assert "| Bias, mean over prompts |" in (folder / "exported" / "README.md").read_text()

    assert main(["sweep", "--runs", "nowhere"]) == 2
    assert "nowhere is not a finished run" in capsys.readouterr().err
    assert main(["sweep", "--runs", "run", "--invariant-scales", "0.001"]) == 2
    assert "two decimals" in capsys.readouterr().err


def test_evidence_reads_a_finished_run(finished, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS.parent / "benchmarks"))
    evidence = import_module("evidence")
    found = evidence.facts(evidence.Row("run", "train", ()), finished[0] / "run")
    assert len(found["digest"]) == 12
    bias = found["report"]["bias"]["before"]["mean"]
    assert f"| run | {found['digest']} | " in evidence.tables({"run": found}, {"run": "train"})
    assert f" | {bias:.3f} [" in evidence.tables({"run": found}, {"run": "train"})


@pytest.mark.slow
def test_the_ablation_runs_its_rows_once_and_prints_the_table(finished) -> None:
    folder, _ = finished
    script = EXPERIMENTS.parent / "benchmarks" / "ablation.py"
    rows = ["backbone", "plus_pairs", "no_groups", "random_groups", "oracle", "bottleneck_10"]
    words = [sys.executable, str(script), "run", "--rows", *rows]
    words += ["--steps", "2", "--samples-per-prompt", "2"]
    first = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    assert "| no groups: one environment | one |" in first.stdout
    assert "No user has them" in first.stdout
    results = read_json(folder / "run" / "ablation" / "ablation.json")
    assert set(results) == set(rows)
    assert results["plus_pairs"]["adapter"]["share"] == 1.0
    second = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    assert second.stdout.count("up to date") == len(rows)


@pytest.mark.slow
def test_peers_run_their_rows_once_and_say_which_cannot_be_run(finished) -> None:
    folder, _ = finished
    script = EXPERIMENTS.parent / "benchmarks" / "peers.py"
    rows = ["nothing", "rewriting", "clusters_0.2", "self_reweighted", "ours", "fine_tuned"]
    words = [sys.executable, str(script), "run", "--prompts-run", "run", "--rows", *rows]
    words += ["--steps", "2", "--samples-per-prompt", "2", "--pilot", "8"]
    first = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    assert "| prompt rewriting | words of the attribute | – |" in first.stdout
    assert "the tokenizer has no token for 'land', 'water'" in first.stdout
    results = read_json(folder / "run" / "peers" / "peers.json")
    assert set(results) == set(rows)
    assert results["nothing"]["cost"] == 1
    assert results["clusters_0.2"]["cost"] > 1
    assert results["fine_tuned"]["share"] == 1
    # The run's own adapter draws what the run drew, of which these are the first.
    drawn = next((folder / "run" / "peers" / "work").glob("ours-*/samples/scale-0.00/000000.png"))
    assert drawn.read_bytes() == (folder / "run/samples/scale-1.00/000000.png").read_bytes()
    second = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    assert second.stdout.count("up to date") == len(rows)


def test_every_file_of_the_finished_run_is_as_recorded(finished, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished[0])
    assert main(["verify", "run"]) == 0
    assert "every recorded file is present and unaltered" in capsys.readouterr().out


@pytest.mark.slow
def test_the_finished_run_can_be_replayed(finished, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished[0])
    assert main(["replay", "run"]) == 0
    assert "0 differ" in capsys.readouterr().out


@pytest.mark.slow
def test_on_two_processes_the_experiment_ends_at_the_same_environments_and_backbone_samples(
    finished, tiny_backbone, monkeypatch
) -> None:
    folder, _ = finished
    monkeypatch.chdir(folder)
    assert main([*_words(tiny_backbone, "two"), "--devices", "2"]) == 0
    part = "environments/environments.safetensors"
    assert digest_file(folder / "run" / part) == digest_file(folder / "two" / part)
    # Two processes compute with one thread each, one with all: sums in another order may round a
    # pixel to the next level.
    for file in sorted((folder / "run" / "samples" / "scale-0.00").glob("*.png")):
        pixels = [
            torch.from_numpy(np.array(Image.open(f))).int()
            for f in (file, folder / "two" / "samples" / "scale-0.00" / file.name)
        ]
        assert (pixels[0] - pixels[1]).abs().max() <= 1
    weights = "adapter/adapter/pytorch_lora_weights.safetensors"
    ours, alone = load_file(folder / "two" / weights), load_file(folder / "run" / weights)
    for name, value in alone.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["data", "classifier", "environments", "adapter", "samples"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_experiment_killed_in_any_stage_goes_on_to_the_same_result(
    finished, tiny_backbone, tmp_path, stage: str, how: signal.Signals
) -> None:
    folder, _ = finished
    # What came before the stage is taken over, so that each case starts at the stage itself.
    earlier = ["data", "classifier", "environments", "adapter", "samples"]
    earlier = earlier[: earlier.index(stage)]
    for name in earlier:
        shutil.copytree(folder / "run" / name, tmp_path / "run" / name)
    shutil.copytree(folder / "cache", tmp_path / "cache")
    words = [sys.executable, "-m", "invdiff_pl", *_words(tiny_backbone, "run")]
    process = subprocess.Popen(words, cwd=tmp_path, start_new_session=True)
    while not (tmp_path / "run" / stage / "started.json").exists():
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(9)  # imports take most of this; the stage itself is under way or just done
    if process.poll() is None and how == signal.SIGTERM:
        process.terminate()  # as `kill` does it: the stage has to be told by its parent
    elif process.poll() is None:
        os.killpg(process.pid, how)
    status = process.wait()
    assert status in (0, {signal.SIGTERM: 143, signal.SIGINT: 130}.get(how, -how))
    subprocess.run(words, cwd=tmp_path, check=True)

    def environments(root: Path) -> dict:
        return load_file(root / "run" / "environments" / "environments.safetensors")

    ours, theirs = environments(tmp_path), environments(folder)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    for part in ("data/images", "samples/scale-0.00", "samples/scale-1.00", "adapter/adapter"):
        assert digest_folder(tmp_path / "run" / part) == digest_folder(folder / "run" / part)
