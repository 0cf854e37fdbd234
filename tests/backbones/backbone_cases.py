"""Pipeline folders shaped as people have them, made from a plain one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file


def change_json(path: Path, **values: Any) -> None:
    """Set values of a JSON file; ``None`` takes a key out."""
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _copy(plain: Path, folder: Path) -> None:
    shutil.copytree(plain, folder)


def _inpaint(plain: Path, folder: Path) -> None:
    _copy(plain, folder)
    change_json(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    change_json(folder / "unet" / "config.json", in_channels=9)


def _nine_channels(plain: Path, folder: Path) -> None:
    _copy(plain, folder)
    change_json(folder / "unet" / "config.json", in_channels=9)


def _xl(plain: Path, folder: Path) -> None:
    _copy(plain, folder)
    change_json(
        folder / "model_index.json",
        _class_name="StableDiffusionXLPipeline",
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        tokenizer_2=["transformers", "CLIPTokenizer"],
    )
    change_json(folder / "unet" / "config.json", addition_embed_type="text_time")


def _flow(plain: Path, folder: Path) -> None:
    _copy(plain, folder)
    name = "FlowMatchEulerDiscreteScheduler"
    change_json(folder / "model_index.json", scheduler=["diffusers", name])
    change_json(folder / "scheduler" / "scheduler_config.json", _class_name=name)


def _flow_sigmas(plain: Path, folder: Path) -> None:
    _copy(plain, folder)
    name = "DPMSolverMultistepScheduler"
    change_json(folder / "model_index.json", scheduler=["diffusers", name])
    change_json(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")


def _single_file(plain: Path, folder: Path) -> None:
    save_file({"model.diffusion_model.x": torch.zeros(1)}, folder)


def _half(plain: Path, folder: Path) -> None:
    _load(plain).to(torch.float16).save_pretrained(folder)


def _variant(plain: Path, folder: Path) -> None:
    _load(plain).to(torch.float16).save_pretrained(folder, variant="fp16")


def _mixed(plain: Path, folder: Path) -> None:
    _half(plain, folder)
    shutil.rmtree(folder / "unet")
    _load(plain).unet.to(torch.float16).save_pretrained(folder / "unet", variant="fp16")
    shutil.rmtree(folder / "vae")
    _load(plain).vae.to(torch.bfloat16).float().save_pretrained(folder / "vae")


def _no_limit(plain: Path, folder: Path) -> None:
    _copy(plain, folder)
    change_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=None)


def _load(plain: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(plain, safety_checker=None)


# Writes the case, made from the first folder, to the second.
REFUSED: dict[str, Callable[[Path, Path], None]] = {
    "inpaint": _inpaint,
    "nine_channels": _nine_channels,
    "xl": _xl,
    "flow": _flow,
    "flow_sigmas": _flow_sigmas,
    "mymodel.safetensors": _single_file,
}
TAKEN: dict[str, Callable[[Path, Path], None]] = {
    "plain": _copy,
    "half": _half,
    "variant": _variant,
    "mixed": _mixed,
    "no_limit": _no_limit,
}
