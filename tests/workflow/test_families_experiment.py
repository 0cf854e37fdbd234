"""Whole runs on families other than Stable Diffusion 1.x and 2.x, with few random weights."""

from pathlib import Path

import pytest
import torch
from child_processes import stages_in_this_process
from safetensors.torch import load_file
from tiny_families import FAMILIES, PROMPTS, made
from trainers import QUICK

import invdiff_pl as inv
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.cli.main import main
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings
from invdiff_pl.utils.files import read_json

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FAST = [
    "--generate.model.least_rare=0",
    "--data.per_prompt=12",
    "--data.held_out=0",  # two images of random weights could choose the untrained adapter
    "--scale.adapter_steps=2",
    "--scale.adapter_batch=8",
    "--scale.eval_samples=1",
    "--scale.calibration_samples=4",
    "--scale.calibration_steps=1",
    "--scale.sampling_steps=1",
    "--scale.samples_per_prompt=2",
    "--scale.sampling_batch=8",
    "--environments.model.settings.starts=4",
    "--environments.model.settings.values=[]",
    "--model.train_without_bias=true",
    "--evaluation.resolution=32",
    "--experiment.cache_dir=cache",
]


def run(name: str, *flags: str) -> None:
    """All stages, here, and the samples once more."""
    made(name).save_pretrained("pipeline")
    words = ["train", "--prompts", "; ".join(PROMPTS), "--experiments", str(EXPERIMENTS)]
    words += ["--backbone", "pipeline", "--run-dir", "run", *FAST, *flags]
    with stages_in_this_process():
        assert main(words) == 0
        assert main([*words, "--scale.samples_per_prompt=3"]) == 0  # draws samples alone anew
    assert Path("run/report/report.html").is_file()
    file = Path("run/adapter/adapter/pytorch_lora_weights.safetensors")
    assert any(bool(value.any()) for key, value in load_file(file).items() if "lora_B" in key)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sd"])
def test_a_run_from_prompts_alone_ends_at_a_lora_that_the_stock_pipeline_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(name)
    facts = read_json(Path("run/adapter/adapter/adapter.json"))
    pipe = made(name)
    assert facts["architecture"] == frozen_denoiser(pipe).architecture
    if name == "pixart":  # whose pipeline loads no LoRAs
        inv.InvDiffPipeline.from_pipe(pipe, lora="run/adapter/adapter")
        return
    pipe.load_lora_weights("run/adapter/adapter")
    assert pipe.get_active_adapters()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights"), [("flux", "bfloat16"), ("flux", "nf4"), ("sdxl", "int8")]
)
def test_a_whole_run_holds_frozen_weights_as_it_is_told(
    name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weights != "bfloat16":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    run(name, f"--scale.frozen_weights={weights}")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sd"])
def test_the_library_finds_and_mitigates_with_any_family(name: str, tmp_path: Path) -> None:
    pipe = made(name)
    before = frozen_denoiser(pipe, 32).network.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    images = inv.PromptedImages(torch.rand(16, 3, 32, 32), PROMPTS * 8)
    found = inv.discover(
        pipe, images, resolution=32, settings=HiddenAttributeSettings(**QUICK), progress=False
    )
    assert found[0].memberships.shape[0] == 16
    lora = inv.debias(
        pipe,
        images,
        torch.arange(16) // 2 % 2,
        steps=2,
        batch_size=8,
        resolution=32,
        calibration_samples=4,
        progress=False,
    )
    assert lora.trained
    after = frozen_denoiser(pipe, 32).network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    even = inv.InvDiffPipeline.from_pipe(pipe, lora)
    assert type(even).__name__ == f"InvDiff{type(pipe).__name__}"
