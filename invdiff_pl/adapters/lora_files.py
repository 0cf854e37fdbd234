"""Contents of LoRA files other than matrices, and a form that all readers read alike."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from invdiff_pl.utils.errors import InvDiffError


def scaled(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return update matrices, float32 on the CPU, the second of each pair multiplied."""
    return {
        name: value.detach().float().cpu() * (factor if ".lora_B." in name else 1.0)
        for name, value in state.items()
    }


def stored_alpha(file: Path, part: str) -> float | None:
    """Read the alpha of a part of the pipeline from a file's header; ``None`` if there is none.

    Raises:
        InvDiffError: if the header is damaged.
    """
    with safe_open(file, "pt") as stored:
        text = (stored.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise InvDiffError(
            f"{file} cannot be read (its lora_adapter_metadata is not valid JSON): rerun the "
            "adapter stage."
        ) from None
    alpha = header.get(f"{part}.lora_alpha") if isinstance(header, dict) else None
    return float(alpha) if isinstance(alpha, int | float) else None


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with sets, which JSON cannot hold, as sorted lists."""
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
