"""Whole runs on families other than Stable Diffusion 1.x and 2.x, with few random weights."""

from pathlib import Path

import pytest
import torch
from child_processes import stages_in_this_process
from safetensors.torch import load_file
from tiny_families import PROMPTS, made
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sdxl", "sd3", "sana"])
def test_a_run_from_prompts_alone_ends_at_a_lora_that_the_stock_pipeline_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(name).save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    words = ["train", "--prompts", "; ".join(PROMPTS), "--experiments", str(EXPERIMENTS)]
    words += ["--backbone", "pipeline", "--run-dir", "run", *FAST]
    with stages_in_this_process():
        assert main(words) == 0
        assert main([*words, "--scale.samples_per_prompt=3"]) == 0  # draws samples alone anew
    facts = read_json(Path("run/adapter/adapter/adapter.json"))
    assert facts["architecture"] == frozen_denoiser(made(name)).architecture
    assert Path("run/report/report.html").is_file()
    file = Path("run/adapter/adapter/pytorch_lora_weights.safetensors")
    assert any(bool(value.any()) for key, value in load_file(file).items() if "lora_B" in key)
    pipe = made(name)
    pipe.load_lora_weights(str(file.parent))
    assert pipe.get_active_adapters()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "pixart", "sana"])
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
