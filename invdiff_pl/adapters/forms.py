"""The forms in which a LoRA is saved: for diffusers, for ComfyUI and A1111, for peft."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from invdiff_pl.utils.files import sort_safetensors_header, write_json
from invdiff_pl.utils.names import require_name
from invdiff_pl.utils.tensors import read_tensors

Form = Literal["diffusers", "kohya", "peft"]
FORMS: tuple[Form, ...] = get_args(Form)
KOHYA_FILE = "lora.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_form(file: Path, form: Form, folder: Path, architecture: str = "unknown") -> Path:
    """Write a LoRA in another form than the one that stock diffusers pipelines load.

    Args:
        file: file that :meth:`LoraAdapter.save_weights` wrote, whose alpha is its rank.
        form: ``kohya``, whose names and per-layer alphas ComfyUI and A1111 read, or ``peft``, which
            ``PeftModel.from_pretrained`` loads into a denoiser.
        folder: folder to write to.
        architecture: architecture of the model that the LoRA is for, by its name in ModelSpec.

    Returns:
        the file of weights.

    Raises:
        InvDiffError: if there is no such form.

    Source: names are as kohya-ss/sd-scripts writes them for UNets and OneTrainer for transformers
    (``lora_transformer_…``), both read by ComfyUI; ``modelspec.*`` is that of
    https://github.com/Stability-AI/ModelSpec.
    """
    require_name("form", form, FORMS)
    state = read_tensors(file, "save the adapter again")
    if form == "kohya":
        return _write_kohya(state, folder / KOHYA_FILE, architecture)
    if form == "peft":
        return _write_peft(state, folder)
    return file


def _write_kohya(state: Mapping[str, Tensor], file: Path, architecture: str) -> Path:
    unet = any(name.startswith("unet.") for name in state)
    renamed = convert_state_dict_to_kohya(dict(state)) if unet else _named_by_layer(state)
    ranks = {value.shape[0] for name, value in renamed.items() if name.endswith("lora_down.weight")}
    rank = max(ranks)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "invdiff",
        "modelspec.architecture": f"{architecture}/lora",
    }
    save_file({name: value.contiguous() for name, value in renamed.items()}, file, metadata)
    sort_safetensors_header(file)
    return file


def _named_by_layer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a transformer's matrices by layer, and add each layer's alpha, which is its rank."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, matrix = name.removesuffix(".weight").rsplit(".", 1)
        key = "lora_" + layer.replace(".", "_")
        renamed[f"{key}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = value
        if matrix == "lora_A":
            renamed[f"{key}.alpha"] = torch.tensor(float(len(value)))
    return renamed


def _write_peft(state: Mapping[str, Tensor], folder: Path) -> Path:
    layers = {name.split(".", 1)[1].rsplit(".lora_", 1)[0] for name in state}
    rank = max(len(value) for name, value in state.items() if ".lora_A." in name)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(layers),
    }
    write_json(folder / PEFT_CONFIG, config)
    inner = {f"base_model.model.{name.split('.', 1)[1]}": each for name, each in state.items()}
    save_file(inner, folder / PEFT_FILE)
    sort_safetensors_header(folder / PEFT_FILE)
    return folder / PEFT_FILE
