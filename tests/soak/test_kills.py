"""Killed at any moment, an experiment that is started again ends at the same result."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import lives
import pytest

from invdiff_pl.cli.main import main
from invdiff_pl.cli.replay import compare
from invdiff_pl.utils.files import is_leftover, read_json
from invdiff_pl.workflow.stages import PLANS

CHANGES = {"train": lives.TRAIN, "backbone": lives.BACKBONE, "prompts": lives.PROMPTS}
PLANNED = {**PLANS, "prompts": PLANS["train"]}
METRICS = {"train": "samples", "backbone": "backbone_samples", "prompts": "samples"}


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lives.frequent_checkpoints(tmp_path_factory.mktemp("kills") / "experiments")


@pytest.fixture(scope="module")
def undisturbed(
    experiments: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, lives.Subject]:
    """Each plan, run in one go."""
    found = {}
    for plan, changes in CHANGES.items():
        folder = tmp_path_factory.mktemp(plan)
        words = lives.words_of(plan, experiments, tiny_backbone, changes)
        subject = lives.Subject(folder, words, folder.with_suffix(".log"))
        subject.finish()
        found[plan] = subject
    return found


def _check(run: Path, expected: Path, plan: str) -> None:
    """A run folder holds the results of the undisturbed one, and nothing is left over."""
    same, different = compare(expected, run, PLANNED[plan])
    assert not different
    assert same > 100
    metrics = Path(METRICS[plan]) / "metrics.json"
    assert read_json(run / metrics) == read_json(expected / metrics)
    assert main(["verify", str(run)]) == 0
    assert not [path for path in run.rglob("*") if is_leftover(path)]
    assert not list(run.glob("*/started.json"))
    assert (run / ".lock").read_text() == ""


def _survive(subject: lives.Subject, undisturbed: lives.Subject, plan: str, seed: int) -> None:
    records = {name: read_json(undisturbed.run / name / "stage.json") for name in PLANNED[plan]}
    seconds = {name: record["seconds"] for name, record in records.items()}
    lives.disturb(subject, 15, seconds, undisturbed.size(), random.Random(seed))
    subject.finish()
    assert "Traceback" not in subject.log.read_text()
    _check(subject.run, undisturbed.run, plan)


@pytest.mark.soak
@pytest.mark.parametrize("plan", list(CHANGES))
def test_killed_again_and_again_it_ends_at_the_undisturbed_result(
    plan, experiments, tiny_backbone, undisturbed, tmp_path, capsys
) -> None:
    wanted = int(os.environ.get("INVDIFF_SOAK_KILLS", "100")) // len(CHANGES)
    seed = int(os.environ.get("INVDIFF_SOAK_SEED", str(time.time_ns() % 100_000)))
    total: Counter[tuple[str, str]] = Counter()
    rounds = 0
    while total.total() < wanted:
        ground = tmp_path / f"ground-{rounds}"
        ground.mkdir()
        words = lives.words_of(plan, experiments, tiny_backbone, CHANGES[plan])
        subject = lives.Subject(ground, words, tmp_path / f"{plan}-{seed}-{rounds}.log")
        mounted = lives.can_mount(ground)
        try:
            _survive(subject, undisturbed[plan], plan, seed + rounds)
        finally:
            if mounted:
                lives.unmount(ground)
        rounds += 1
        total += subject.events
        counts = {f"{how} in {stage}": count for (how, stage), count in sorted(total.items())}
        with capsys.disabled():
            print(f"\n{plan}, seed {seed}: {total.total()} events in {rounds} runs survived")
            print(json.dumps(counts, indent=1), flush=True)


@pytest.mark.soak
def test_a_slurm_job_that_is_queued_again_goes_on_from_the_checkpoint_of_its_last_step(
    experiments, tiny_backbone, undisturbed, tmp_path
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\n')
    scontrol.chmod(0o755)
    ids = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", **ids}
    job |= {"SLURM_JOB_NAME": "invdiff", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    ground = tmp_path / "ground"
    ground.mkdir()
    words = lives.words_of("train", experiments, tiny_backbone, lives.TRAIN)
    subject = lives.Subject(ground, words, tmp_path / "slurm.log", job)
    life = subject.start()
    adapter = subject.run / "adapter"
    while life.exitcode is None and not (adapter / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.005)
    assert life.pid is not None
    os.kill(life.pid, signal.SIGUSR1)
    while life.exitcode is None and not (scontrol.parent / "calls").exists():
        time.sleep(0.005)
    life.kill()  # as SLURM does
    life.join()
    assert (scontrol.parent / "calls").read_text() == "requeue 7\n"
    (checkpoint,) = adapter.glob("hpc_ckpt_*.ckpt")
    subject.finish()
    assert f"--ckpt_path=run/adapter/{checkpoint.name}" in subject.log.read_text()
    assert len(compare(undisturbed["train"].run, subject.run, PLANNED["train"])[1]) == 0
