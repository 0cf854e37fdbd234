"""Which backbones are refused, in which words, before anything runs or torch is imported."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_cases import REFUSED, TAKEN
from diffusers import StableDiffusionPipeline
from tiny_families import FAMILIES, PROMPTS, made

from invdiff_pl.backbones.check import check_backbone
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.utils.errors import InvDiffError

TOLD = {
    "inpaint": ["StableDiffusionInpaintPipeline", "takes 9 channels where the latents have 4"],
    "nine_channels": ["takes 9 channels where the latents have 4"],
    "xl": ["its text_encoder_2 holds no config.json"],
    "flow": ["FlowMatchEulerDiscreteScheduler, is of flow matching, not of diffusion"],
    "flow_sigmas": ["DPMSolverMultistepScheduler, is of flow matching, not of diffusion"],
    "mymodel.safetensors": ["is a single file; convert it once, by `python -c"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_told_in_one_line(name, tiny_backbone, tmp_path) -> None:
    REFUSED[name](tiny_backbone, tmp_path / name)
    for refuse in (check_backbone, load_pipeline):
        with pytest.raises(InvDiffError) as error:
            refuse(str(tmp_path / name))
        message = str(error.value)
        assert str(tmp_path / name) in message
        assert "\n" not in message
        for words in TOLD[name]:
            assert words in message


@pytest.mark.parametrize("name", TAKEN)
def test_what_can_be_loaded_is_not_refused(name, tiny_backbone, tmp_path) -> None:
    TAKEN[name](tiny_backbone, tmp_path / name)
    check_backbone(str(tmp_path / name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_each_family_is_loaded_whole_and_without_its_denoiser(name, tmp_path) -> None:
    pipe = made(name)
    pipe.save_pretrained(tmp_path)
    assert check_backbone(str(tmp_path)) == type(pipe).__name__
    loaded = load_pipeline(str(tmp_path))
    torch.testing.assert_close(_predicted(loaded), _predicted(pipe))
    assert not any(value.requires_grad for value in frozen_denoiser(loaded).network.parameters())
    without = load_pipeline(str(tmp_path), with_denoiser=False)
    assert (frozen_denoiser(without, 32).network is None) == (name != "sd3")
    rows = frozen_denoiser(without, 32).condition(PROMPTS)
    expected = frozen_denoiser(pipe, 32).condition(PROMPTS)
    for key, value in expected.items():
        torch.testing.assert_close(rows[key], value)


def _predicted(pipe: Any) -> torch.Tensor:
    denoiser = frozen_denoiser(pipe, 32)
    noise = denoiser.initial_noise([0], seed=0)[0]
    return denoiser.predict(noise, torch.tensor([500]), denoiser.condition(PROMPTS[:1]))


@pytest.mark.parametrize("name", ["waterbirds", "celeba", "fairface"])
def test_the_shipped_backbones_are_not_refused(name: str) -> None:
    check_backbone(f"asset:{name}")


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ("/nowhere", "does not exist"),
        ("./nowhere", "does not exist"),
        ("models/sd/nowhere", "does not exist"),
        ("nobody/nothing", "is not a local folder and cannot be loaded from the hub"),
        ("asset:nothing", "no backbone 'nothing' is shipped"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(backbone, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvDiffError, match=told) as error:
        check_backbone(backbone)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_pipeline_is_told(tmp_path) -> None:
    with pytest.raises(InvDiffError, match=r"holds no model_index\.json: expected a pipe"):
        check_backbone(str(tmp_path))


def test_the_line_that_converts_a_single_file_writes_the_folder_it_names(
    tiny_backbone, tmp_path, monkeypatch
) -> None:
    """What only a model of full size can show, reading the file, is left out."""
    file = tmp_path / "my model's.safetensors"
    REFUSED["mymodel.safetensors"](tiny_backbone, file)
    with pytest.raises(InvDiffError) as error:
        check_backbone(str(file))
    _, line, rest = str(error.value).split("`")
    program, flag, code = shlex.split(line)
    assert (program, flag) == ("python", "-c")
    seen = []

    def read(path: str) -> StableDiffusionPipeline:
        seen.append(path)
        return StableDiffusionPipeline.from_pretrained(tiny_backbone, safety_checker=None)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", read)
    exec(code, {})
    assert seen == [str(file)]
    folder = ast.literal_eval(rest.removeprefix(", and give the folder ").removesuffix("."))
    check_backbone(folder)
    assert Path(folder) == file.with_suffix("")


def test_checking_does_not_import_torch() -> None:
    words = (
        "import sys; from invdiff_pl.backbones.check import check_backbone; "
        "check_backbone('asset:waterbirds'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0
