"""Checking from its JSON files alone whether a backbone is of a kind that can be used.

This module does not import torch, so that a wrong backbone is refused before the first stage runs.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invdiff_pl.backbones.assets import resolve_backbone
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import is_file, is_folder, read_object

_CLIP, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
_FLOW, _DIFFUSION = "flow matching", "diffusion"


@dataclass(frozen=True)
class Family:
    """What a family's pipelines are made of.

    Attributes:
        denoiser: name and class of the denoiser.
        others: classes of the other parts by name; ``None`` for any class.
        kind: kind of schedule.
        packing: number of latent pixels that are packed into one token of the denoiser's input.
    """

    denoiser: tuple[str, str]
    others: Mapping[str, str | None]
    kind: str = _FLOW
    packing: int = 1


_STABLE_DIFFUSION = Family(
    ("unet", "UNet2DConditionModel"),
    {"vae": "AutoencoderKL", "text_encoder": _CLIP, "tokenizer": "CLIPTokenizer"},
    _DIFFUSION,
)
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": _STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": Family(
        _STABLE_DIFFUSION.denoiser,
        {**_STABLE_DIFFUSION.others, "text_encoder_2": _PROJECTED, "tokenizer_2": "CLIPTokenizer"},
        _DIFFUSION,
    ),
    "StableDiffusion3Pipeline": Family(
        ("transformer", "SD3Transformer2DModel"),
        {"vae": "AutoencoderKL", "text_encoder": _PROJECTED, "text_encoder_2": _PROJECTED},
    ),
    "FluxPipeline": Family(
        ("transformer", "FluxTransformer2DModel"),
        {"vae": "AutoencoderKL", "text_encoder": _CLIP, "text_encoder_2": "T5EncoderModel"},
        packing=4,
    ),
    "Flux2KleinPipeline": Family(
        ("transformer", "Flux2Transformer2DModel"),
        {"vae": "AutoencoderKLFlux2", "text_encoder": "Qwen3ForCausalLM", "tokenizer": None},
        packing=4,
    ),
    "PixArtSigmaPipeline": Family(
        ("transformer", "PixArtTransformer2DModel"),
        {"vae": "AutoencoderKL", "text_encoder": "T5EncoderModel", "tokenizer": None},
        _DIFFUSION,
    ),
    "SanaPipeline": Family(
        ("transformer", "SanaTransformer2DModel"),
        {"vae": "AutoencoderDC", "text_encoder": None, "tokenizer": None},
    ),
    "Lumina2Pipeline": Family(
        ("transformer", "Lumina2Transformer2DModel"),
        {"vae": "AutoencoderKL", "text_encoder": None, "tokenizer": None},
    ),
    "ZImagePipeline": Family(
        ("transformer", "ZImageTransformer2DModel"),
        {"vae": "AutoencoderKL", "text_encoder": None, "tokenizer": None},
    ),
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Where a pipeline's parts may come from; the last is what old folders call their safety checker.
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# Keys of a UNet's configuration for inputs beside latents, timestep and text, which are not given.
_CONDITIONS = (
    "class_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)

Reader = Callable[[str], dict[str, Any] | None]


def check_backbone(backbone: str) -> str:
    """Refuse a backbone that is not a pipeline of a supported family.

    Args:
        backbone: a pipeline folder, a hub id, or ``asset:NAME``. The configurations of a hub id are
            downloaded unless they are cached.

    Returns:
        name of the pipeline's class.

    Raises:
        InvDiffError: if anything does not fit; one line names all of it: the pipeline's class, its
            parts, the channels, the scheduler.

    Example:
        >>> check_backbone("asset:waterbirds")
        'StableDiffusionPipeline'
    """
    source = resolve_backbone(backbone)
    read = _reader(source)
    index = read("model_index.json")
    if index is None:
        raise InvDiffError(f"the backbone {source!r} holds no model_index.json: {_EXPECTED}.")
    _require_plain_parts(source, index)
    found = str(index.get("_class_name"))
    # An unknown class is compared with the simplest family, and all differences are listed.
    family = FAMILIES.get(found, _STABLE_DIFFUSION)
    problems = [] if found in FAMILIES else [f"its class is {found}"]
    part = family.denoiser[0]
    denoiser, vae = (read(f"{name}/config.json") or {} for name in (part, "vae"))
    problems += [
        *_wrong_parts(index, family, read),
        *_wrong_channels(part, family.packing, denoiser, vae),
        *_unknown_conditions(part, found, denoiser),
        *_wrong_scheduler(index, family.kind, read("scheduler/scheduler_config.json")),
    ]
    if problems:
        raise InvDiffError(
            f"the backbone {source!r} cannot be used: {'; '.join(problems)}; {_EXPECTED}."
        )
    return found


def is_flow(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's configuration is one of flow matching."""
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return True
    return str(config.get("_class_name", "")).startswith("FlowMatch") or "shift" in config


def text_parts(backbone: str) -> list[str]:
    """Return the names of a backbone's tokenizers and text encoders."""
    index = _reader(resolve_backbone(backbone))("model_index.json") or {}
    names = ("tokenizer", "text_encoder")
    return [part for part in index if part.startswith(names) and _class_of(index, part)]


def absent_parts(backbone: str) -> list[str]:
    """Return the optional parts that a pipeline lacks, such as SD3's third text encoder."""
    present = text_parts(backbone)
    return [part for part in ("text_encoder_3", "tokenizer_3") if part not in present]


def denoiser_part(pipeline: str) -> str:
    """Return a supported pipeline class's name for its denoiser, ``unet`` or ``transformer``."""
    return FAMILIES[pipeline].denoiser[0]


_EXPECTED = (
    "expected a pipeline of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5, FLUX.1, FLUX.2 [klein], "
    "PixArt-Σ, Sana, Lumina 2 or Z-Image, or one fine-tuned from it"
)


def _reader(source: str) -> Reader:
    """Return a reader of a backbone's JSON files, which gives ``None`` for a file it lacks."""
    path = Path(source).expanduser()
    if is_file(path):
        raise InvDiffError(_conversion(path))
    if is_folder(path):
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
            return None  # loading it gives a better message
        if isinstance(error, EntryNotFoundError) and not isinstance(error, OSError):
            return None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvDiffError(
            f"the backbone {source!r} is not a local folder and cannot be loaded from the hub: "
            f"{reason}"
        ) from None


def _conversion(file: Path) -> str:
    """Return the message on a backbone that is a single file, and how to convert it."""
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
    """Refuse parts of other libraries, since loading would import them."""
    for name, part in index.items():
        if not isinstance(part, list):
            continue
        library = part[0] if part else None
        if library not in _LIBRARIES:
            raise InvDiffError(
                f"{source}/model_index.json: {name} is of the library {library!r}, which is not "
                "loaded: expected parts of diffusers and transformers only."
            )


def _wrong_parts(index: dict[str, Any], family: Family, read: Reader) -> list[str]:
    problems = []
    name, kind = family.denoiser
    for part, expected in {name: kind, **family.others, "scheduler": None}.items():
        found = _class_of(index, part)
        if found is None:
            problems.append(f"it has no {part}")
        elif expected is not None and found.removesuffix("Fast") != expected:
            problems.append(f"its {part} is a {found}, not a {expected}")
        elif "encoder" in part and read(f"{part}/config.json") is None:
            problems.append(f"its {part} holds no config.json")
    return problems


def _class_of(index: dict[str, Any], part: str) -> str | None:
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
        return None
    return str(entry[1])


def _wrong_channels(
    part: str, packing: int, denoiser: dict[str, Any], vae: dict[str, Any]
) -> list[str]:
    given = vae.get("latent_channels", 4) * packing
    taken = denoiser.get("in_channels", given)
    predicted = denoiser.get("out_channels") or taken
    problems = []
    if taken != given:
        problems.append(f"its {part} takes {taken} channels where the latents have {given}")
    if predicted not in (given, 2 * given):  # some predict a variance, too
        problems.append(f"its {part} predicts {predicted} channels where the latents have {given}")
    return problems


def _unknown_conditions(part: str, pipeline: str, denoiser: dict[str, Any]) -> list[str]:
    more = pipeline == "StableDiffusionXLPipeline"
    values = {name: denoiser.get(name) for name in _CONDITIONS}
    added = denoiser.get("addition_embed_type")
    values["addition_embed_type"] = None if more and added == "text_time" else added
    return [
        f"its {part} needs more than latents, timestep and text ({name} is {value!r})"
        for name, value in values.items()
        if value is not None
    ]


def _wrong_scheduler(index: dict[str, Any], kind: str, config: dict[str, Any] | None) -> list[str]:
    config = config or {}
    name = _class_of(index, "scheduler") or ""
    prediction = config.get("prediction_type", "epsilon")
    flow = is_flow({**config, "_class_name": name})
    if (found := _FLOW if flow else _DIFFUSION) != kind:
        return [f"its scheduler, {name}, is of {found}, not of {kind}"]
    if not flow and prediction not in PREDICTION_TYPES:
        expected = ", ".join(PREDICTION_TYPES)
        return [f"its scheduler's prediction_type is {prediction!r}, none of {expected}"]
    return []
