"""Damaged input of every kind ends in success or one clear refusal, and changes no file."""

import os
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import targets
from feeding import Target, feed

LEAN = 12
SEED = int(os.environ.get("INVDIFF_SOAK_SEED", str(time.time_ns() % 1_000_000)))


def _fuzz(chosen: list[Target], inputs: int, seed: int, folder: Path) -> Counter[str]:
    """Feed each target; returns how many inputs of each kind were read, and how many refused."""
    counts: Counter[str] = Counter()
    failures = []
    for number, target in enumerate(chosen):
        healthy = folder / f"healthy-{number}"
        healthy.mkdir(parents=True)
        target.make(healthy)
        target.read(healthy)
        if target.writes:
            shutil.rmtree(healthy)
            healthy.mkdir()
            target.make(healthy)
        for trial in range(max(1, inputs // target.cost)):
            try:
                read = feed(target, healthy, folder / f"{number}-{trial}", seed + trial)
            except AssertionError as error:
                failures.append(str(error)[:400])
            else:
                counts[f"{target.kind}: {'read' if read else 'refused'}"] += 1
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:40])
    return counts


def test_damaged_files_are_read_or_refused(tmp_path, capsys) -> None:
    counts = _fuzz(targets.TARGETS, LEAN, 0, tmp_path)
    refused = sum(count for name, count in counts.items() if name.endswith("refused"))
    assert refused > counts.total() / 4


def test_damaged_pipelines_and_adapters_are_read_or_refused(tiny_backbone, tmp_path) -> None:
    assert _fuzz(targets.pipeline_targets(tiny_backbone), LEAN, 0, tmp_path).total() > 0


@pytest.mark.soak
def test_many_damaged_files_are_read_or_refused(tiny_backbone, tmp_path, capsys) -> None:
    wanted = int(os.environ.get("INVDIFF_SOAK_INPUTS", "10000"))
    chosen = [*targets.TARGETS, *targets.pipeline_targets(tiny_backbone)]
    each = int(wanted / sum(1 / target.cost for target in chosen)) + 1
    counts = _fuzz(chosen, each, SEED, tmp_path)
    with capsys.disabled():
        print(f"\n{counts.total()} damaged inputs, seed {SEED}")
        for name, count in sorted(counts.items()):
            print(f"  {name}: {count}")
    assert counts.total() >= wanted
