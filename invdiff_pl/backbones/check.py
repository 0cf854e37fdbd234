"""Whether a backbone is of a kind that can be used, told from its JSON files alone.

Knows nothing of torch, so that a wrong backbone is refused before the first stage runs.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from invdiff_pl.backbones.assets import resolve_backbone
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_object

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "scheduler": None,
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Where a pipeline's parts may come from; the last is what old folders call their safety checker.
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# Of a UNet's configuration: inputs beside latents, timestep and text, which are not given.
_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)

Reader = Callable[[str], dict[str, Any] | None]


def check_backbone(backbone: str) -> None:
    """Refuse a backbone that is no Stable-Diffusion-1.x/2.x-compatible pipeline.

    Args:
        backbone: a pipeline folder, a hub id, or ``asset:NAME``. Of a hub id the configurations
            are fetched, unless they are cached.

    Raises:
        InvDiffError: in one line, with all that does not fit: the pipeline's class, its parts, the
            channels, the scheduler.

    Example:
        >>> check_backbone("asset:waterbirds")
    """
    source = resolve_backbone(backbone)
    read = _reader(source)
    index = read("model_index.json")
    if index is None:
        raise InvDiffError(f"the backbone {source!r} holds no model_index.json: {_EXPECTED}.")
    _require_plain_parts(source, index)
    problems = [
        *_wrong_classes(index),
        *_wrong_unet(read("unet/config.json"), read("vae/config.json")),
        *_wrong_scheduler(index, read("scheduler/scheduler_config.json")),
    ]
    if problems:
        raise InvDiffError(
            f"the backbone {source!r} cannot be used: {'; '.join(problems)}; {_EXPECTED}."
        )


_EXPECTED = (
    "expected a StableDiffusionPipeline of Stable Diffusion 1.x or 2.x, or one fine-tuned from it"
)


def _reader(source: str) -> Reader:
    """Reads a JSON file of a backbone; gives ``None`` where there is no such file."""
    path = Path(source).expanduser()
    if path.is_file():
        raise InvDiffError(_conversion(path))
    if path.is_dir():
        return lambda name: read_object(path / name) if (path / name).is_file() else None
    if path.is_absolute() or source.startswith(("./", "../", "~")) or source.count("/") > 1:
        raise InvDiffError(
            f"the backbone {source!r} does not exist: give a pipeline folder, a hub id or "
            "asset:NAME."
        )
    return lambda name: _read_from_hub(source, name)


def _read_from_hub(source: str, name: str) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - local folders do not need it
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415

    try:
        return read_object(Path(hf_hub_download(source, name)))
    except InvDiffError:
        raise
    except Exception as error:
        if name != "model_index.json":
            return None  # loading tells more
        if isinstance(error, EntryNotFoundError) and not isinstance(error, OSError):
            return None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvDiffError(
            f"the backbone {source!r} is no folder here and cannot be had from the hub: {reason}"
        ) from None


def _conversion(file: Path) -> str:
    """What to do about a single file of weights."""
    if file.suffix not in _SINGLE_FILES:
        return f"the backbone {str(file)!r} is a file: {_EXPECTED}, as a folder or hub id."
    folder = file.with_suffix("")
    code = (
        "from diffusers import StableDiffusionPipeline as P; "
        f"P.from_single_file({json.dumps(str(file))}).save_pretrained({json.dumps(str(folder))})"
    )
    return (
        f"the backbone {str(file)!r} is a single file; convert it once, by "
        f"`python -c {shlex.quote(code)}`, and give the folder {str(folder)!r}."
    )


def _require_plain_parts(source: str, index: dict[str, Any]) -> None:
    """Refuse parts of other libraries: they would be imported."""
    for name, part in index.items():
        if not isinstance(part, list):
            continue
        library = part[0] if part else None
        if library not in _LIBRARIES:
            raise InvDiffError(
                f"{source}/model_index.json: {name} is of the library {library!r}, which is not "
                "loaded: expected parts of diffusers and transformers only."
            )


def _wrong_classes(index: dict[str, Any]) -> list[str]:
    found = index.get("_class_name")
    problems = [] if found in PIPELINES else [f"its class is {found}"]
    for name, expected in PARTS.items():
        part = index.get(name)
        kind = part[1] if isinstance(part, list) and len(part) == 2 else None
        if kind is None:
            problems.append(f"it has no {name}")
        elif expected is not None and str(kind).removesuffix("Fast") != expected:
            problems.append(f"its {name} is a {kind}, not a {expected}")
    return problems


def _wrong_unet(unet: dict[str, Any] | None, vae: dict[str, Any] | None) -> list[str]:
    unet, vae = unet or {}, vae or {}
    problems = []
    taken, given = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    predicted = unet.get("out_channels", 4)
    if taken != given:
        problems.append(f"its unet takes {taken} channels where the latents have {given}")
    if predicted != given:
        problems.append(f"its unet predicts {predicted} channels where the latents have {given}")
    problems += [
        f"its unet needs more than latents, timestep and text ({name} is {unet[name]!r})"
        for name in _CONDITIONS
        if unet.get(name) is not None
    ]
    return problems


def _wrong_scheduler(index: dict[str, Any], config: dict[str, Any] | None) -> list[str]:
    config = config or {}
    part = index.get("scheduler")
    name = str(part[1]) if isinstance(part, list) and len(part) == 2 else ""
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return [f"its scheduler, {name}, is of flow matching, not of diffusion"]
    if prediction not in PREDICTION_TYPES:
        expected = ", ".join(PREDICTION_TYPES)
        return [f"its scheduler's prediction_type is {prediction!r}, none of {expected}"]
    return []
