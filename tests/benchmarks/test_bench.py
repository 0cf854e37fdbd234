"""The benchmark's own pieces: timing, counting, and that both recipes compute the same."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks, as their scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Four pictures and the blocks of Stable Diffusion 1.4, thin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        bench_work = import_module("bench_work")
        folder = tmp_path_factory.mktemp("bench")
        bench_work.write_sd_backbone(folder / "backbone", bench_work.THIN)
        return bench_work.Work.make(
            folder, str(folder / "backbone"), 4, batch=4, device=torch.device("cpu")
        )


def test_two_functions_are_timed_in_turn_and_the_first_round_warms_up(load: Any) -> None:
    now = [0.0]
    order: list[str] = []

    def work(name: str, seconds: float) -> None:
        # The round that warms up is a hundred times as slow.
        now[0] += seconds * (100 if len(order) < 2 else 1)
        order.append(name)

    found = load("bench_measure").interleaved(
        lambda: work("a", 4), lambda: work("b", 1), 3, lambda: now[0], torch.device("cpu")
    )
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert (found.first, found.second) == ([4.0] * 3, [1.0] * 3)
    assert found.ratios() == (4, 4, 4)
    assert found.ratios(work=2.5) == (10, 10, 10)


def test_ratios_are_taken_round_by_round(load: Any) -> None:
    comparison = load("bench_measure").Comparison([2.0, 30.0, 6.0], [1.0, 10.0, 1.0])
    assert comparison.ratios() == (2, 3, 6)


def test_a_child_tells_its_peak_and_a_failed_one_why(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = load("bench_measure")
    script = tmp_path / "child.py"
    script.write_text(
        "import bench_measure, torch\n"
        "cpu = torch.device('cpu')\n"
        "before = bench_measure.peak_mib(cpu)\n"
        "torch.ones(200 << 18)\n"  # 200 MiB
        "print('words', bench_measure.peak_mib(cpu) - before)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=":")
    # The parent's own peak is higher than the child's, and must not count.
    kept = torch.ones(800 << 18)
    assert 190 < measure.peak_of_child(str(script), []) < 210
    del kept
    script.write_text("raise SystemExit('out of luck')")
    with pytest.raises(RuntimeError, match="out of luck"):
        measure.peak_of_child(str(script), [])


def test_the_large_architecture_has_the_parameters_of_stable_diffusion(load: Any) -> None:
    work, measure = load("bench_work"), load("bench_measure")
    with torch.device("meta"):
        assert measure.parameters(work.sd_unet(work.SD14)) == 859_520_964


@pytest.mark.parametrize("name", ["scoring", "adapter"])
def test_both_recipes_have_the_same_losses_on_the_same_draws(
    load: Any, thin: Any, name: str
) -> None:
    stage = load("bench_stages").STAGES[name](thin, False)
    assert float(stage.parity.split()[3]) < 1e-2  # latents are cached in float16
    assert stage.required > 1e6
    stage.reference()
    stage.ours()


def test_only_the_adapter_learns_on_both_sides(load: Any, thin: Any) -> None:
    training = load("bench_stages").Training(thin, "lora", steps=2)
    for module, step in (
        (training.theirs, training.reference),
        (training.ours_module, training.ours),
    ):
        before = {name: value.clone() for name, value in module.denoiser.named_parameters()}
        step()
        changed = {
            name
            for name, value in module.denoiser.named_parameters()
            if not torch.equal(value, before[name])
        }
        assert changed
        assert all(".invdiff." in name for name in changed)


def test_a_run_prints_tables_and_writes_what_it_found(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = "bench.py --architecture thin --stages partition --images 2 --rounds 1 --memory"
    words += f" --no-ladder --output {tmp_path / 'found.json'}"
    monkeypatch.setattr(sys, "argv", words.split())
    assert load("bench").main() == 0
    found = json.loads((tmp_path / "found.json").read_text())["stages"]
    assert [result["stage"] for result in found] == ["partition"]
    assert found[0]["ratio"] > 1
    assert found[0]["ratio_range"][0] <= found[0]["ratio"] <= found[0]["ratio_range"][1]
    assert f"| {found[0]['ours_per_s']:.3g} |" in capsys.readouterr().out


def test_a_whole_run_adds_up_what_its_stages_take(load: Any) -> None:
    bench = load("bench_whole")
    rounds = {"reference_seconds": [3.0, 5.0], "ours_seconds": [1.0, 1.0]}
    results = [{"stage": name, **rounds} for name in bench.UNITS]
    theirs, ours = (sum(each) for each in zip(*bench.UNITS.values(), strict=True))
    found = bench.whole_run(results)
    assert found["ratio_range"] == pytest.approx([3 * theirs / ours, 5 * theirs / ours])
    assert found["ours_per_s"] == pytest.approx(1 / ours)
    assert bench.whole_run(results[1:]) is None


@pytest.mark.slow
def test_every_stage_and_every_rung_runs_on_the_thin_architecture(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load("bench_environments"), "IMAGES", 240)
    words = "bench.py --architecture thin --images 4 --batch 4 --rounds 1 --memory"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--output", str(tmp_path / "found.json")])
    assert load("bench").main() == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["stages"]) == 15
    assert {rung["stage"] for rung in found["ladder"]} == {
        "scoring",
        "adapter (lora)",
        "adapter (small_unet)",
        "sampling",
    }
