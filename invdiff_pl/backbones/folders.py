"""Pipeline folders as files: which weights they hold, and how to make them load anywhere.

This module does not import torch.
"""

import re
from pathlib import Path
from typing import Any

from invdiff_pl.utils.files import read_json, write_json

# A file of weights, or the index of several; plain ones name no variant.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<file>\w+))?(?:-\d+-of-\d+)?\.safetensors"
    r"(?:\.index(?:\.(?P<index>\w+))?\.json)?"
)
# If there are several variants and no plain file, the first of these is loaded.
_PREFERRED = ("fp32", "bf16", "fp16")


def weights_variant(part: Path) -> str | None:
    """Return the ``variant`` that a part's weights have to be loaded with.

    Args:
        part: folder of a part of a pipeline, such as ``PIPELINE/unet``.

    Returns:
        the variant, such as ``fp16`` for ``diffusion_pytorch_model.fp16.safetensors``; ``None`` if
        there is a plain file, or no file at all.
    """
    matches = [_WEIGHTS.fullmatch(path.name) for path in part.glob("*.safetensors*")]
    variants = {match["file"] or match["index"] for match in matches if match}
    if not variants or None in variants:
        return None
    for name in _PREFERRED:
        if name in variants:
            return name
    return min(variants)


def pipeline_variant(folder: Path) -> str | None:
    """Return the first variant that a part of a pipeline needs; diffusers uses it where it can.

    >>> pipeline_variant(Path("invdiff_pl/assets/waterbirds"))
    """
    parts = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return next((found for part in parts if (found := weights_variant(part))), None)


def make_portable(folder: Path) -> None:
    """Change a pipeline folder so that ``from_pretrained(folder)`` loads it with no more arguments.

    Its configurations forget where the parts were loaded from, weights of a variant become plain
    ones if there are no others, all parts are loaded in one dtype, and the tokenizer knows how many
    tokens the text encoder takes.
    """
    for part in [path for path in folder.iterdir() if path.is_dir()]:
        _name_plainly(part)
    for path in folder.rglob("*.json"):
        config = read_json(path)
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            write_json(path, config)
    load_in_one_dtype(folder)
    _limit_tokens(folder)


def load_in_one_dtype(folder: Path) -> None:
    """Make ``from_pretrained(folder)`` load every part in float32 if no dtype is asked for.

    diffusers does so anyway, whatever is stored; transformers takes the dtype in its configuration.
    """
    for path in folder.glob("*/config.json"):
        config = read_json(path)
        if isinstance(config, dict) and {"architectures", "model_type"} & config.keys():
            _set_dtype(config)
            config["dtype"] = "float32"
            write_json(path, config)


def _set_dtype(config: dict[str, Any]) -> None:
    for key, value in list(config.items()):
        if isinstance(value, dict):
            _set_dtype(value)
        elif key == "torch_dtype":  # the older name
            del config[key]
        elif key == "dtype":
            config[key] = "float32"


def _name_plainly(part: Path) -> None:
    variant = weights_variant(part)
    if variant is None:
        return
    for path in list(part.iterdir()):
        if _WEIGHTS.fullmatch(path.name):  # files that an index lists keep their names
            path.rename(path.with_name(path.name.replace(f".{variant}.", ".")))


def _limit_tokens(folder: Path) -> None:
    for number in ("", "_2"):
        tokenizer = folder / f"tokenizer{number}" / "tokenizer_config.json"
        text_encoder = folder / f"text_encoder{number}" / "config.json"
        if not (tokenizer.is_file() and text_encoder.is_file()):
            continue
        config, told = read_json(tokenizer), read_json(text_encoder)
        most = told.get("max_position_embeddings")
        clip = str(told.get("model_type", "")).startswith("clip")
        if clip and isinstance(most, int) and config.get("model_max_length", most + 1) > most:
            write_json(tokenizer, {**config, "model_max_length": most})
