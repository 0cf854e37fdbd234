"""What a whole run with a published model is said to cost."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run_costs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("run_costs")


def test_settings_are_those_of_the_scales_file_and_of_what_it_extends(run_costs) -> None:
    chosen = run_costs.settings_of("sdxl")
    assert (chosen.sampling_steps, chosen.max_micro_batch) == (50, 8)
    assert (chosen.adapter_batch, chosen.adapter_settings) == (64, {"rank": 16})
    assert chosen.samples_per_prompt == 256  # of the class


@pytest.mark.slow
def test_stable_diffusion_costs_what_its_published_sizes_say(run_costs) -> None:
    name = "Stable Diffusion 1.5"
    found = run_costs.costs(run_costs.MODELS[name], run_costs.settings_of(run_costs.SCALES[name]))
    assert found.weights == pytest.approx(2 * (859_520_964 + 83_653_863 + 123_060_480), rel=1e-3)
    assert found.activations == pytest.approx(14.9 * 2**30, rel=0.01)
    # A pass takes 0.803 TFLOP: 50 guided steps of 256 samples before and after, and 6 looks.
    passes = 2 * 256 * 2 * 50 + 6 * 4 * 2 * 12
    assert found.a_prompt == pytest.approx(0.803e12 * passes, rel=0.05)
    assert found.disk_image == 128 * 1024 + 2 * 5 * 1280 * 2
