"""Loading the frozen backbone, a diffusers pipeline, and sampling from it."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from invdiff_pl.backbones.assets import resolve_backbone
from invdiff_pl.backbones.check import FAMILIES, absent_parts, check_backbone, text_parts
from invdiff_pl.backbones.denoiser import Condition
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.folders import make_portable, weights_variant
from invdiff_pl.backbones.quantized import QUANTIZED, dtype_of, quantize
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.names import FROZEN_WEIGHTS, require_name


def load_pipeline(
    backbone: str,
    weights: str = "float32",
    *,
    with_denoiser: bool = True,
    with_text_encoders: bool = True,
) -> Any:
    """Load a pipeline of a supported family, frozen and in evaluation mode.

    Whatever dtypes its files hold, all parts get the same one. If a folder has no plain weights,
    those of a variant such as ``fp16`` are loaded.

    Args:
        backbone: a pipeline folder, a hub id, or ``asset:NAME``.
        weights: dtype of the weights, ``float32``, ``bfloat16`` or ``float16``; or ``int8`` or
            ``nf4``, to which the denoiser's linear layers are rounded, all else being bfloat16.
        with_denoiser: whether to load the denoiser, which is most of a large pipeline.
        with_text_encoders: whether to load the text encoders.

    Raises:
        InvDiffError: if there is no such folder or hub id, it is not a supported pipeline, its
            weights are pickles, its parts are of other libraries, or bitsandbytes is missing.
    """
    require_name("frozen_weights", weights, FROZEN_WEIGHTS)
    name = check_backbone(backbone).replace("Img2Img", "")
    family, source = FAMILIES[name], resolve_backbone(backbone)
    part, denoiser = family.denoiser
    kind, dtype = getattr(diffusers, name), dtype_of(weights)
    # An SD3 pipeline without its third text encoder takes that one's width from its denoiser.
    left_out = _left_out(kind, source)
    needed = with_denoiser or "text_encoder_3" in left_out
    if not with_text_encoders:
        left_out |= dict.fromkeys(n for n in text_parts(backbone) if n.startswith("text_encoder"))
    with _told_of(source, name):
        pipeline = kind.from_pretrained(
            source,
            **{part: _whole(denoiser, source, part, dtype) if needed else None},
            vae=_whole(str(family.others["vae"]), source, "vae", dtype),
            dtype=dtype,
            variant=weights_variant(Path(source) / "text_encoder"),
            use_safetensors=True,  # the other formats are pickles, which may run code
            **left_out,
        )
    pipeline.set_progress_bar_config(disable=True)
    if with_denoiser and weights in QUANTIZED:
        quantize(getattr(pipeline, part), weights)
    return frozen(pipeline)


def load_autoencoder(backbone: str) -> Any:
    """Load a backbone's autoencoder alone, frozen, in evaluation mode and float32.

    Raises:
        InvDiffError: as :func:`load_pipeline` does.
    """
    name, source = check_backbone(backbone), resolve_backbone(backbone)
    with _told_of(source, name):
        vae = _whole(str(FAMILIES[name].others["vae"]), source, "vae", torch.float32)
    return vae.requires_grad_(False).eval()


@contextmanager
def _told_of(source: str, name: str) -> Iterator[None]:
    """Turn whatever damaged parts raise into an error of one sentence."""
    try:
        yield
    except InvDiffError:
        raise
    except Exception as error:  # each format's reader raises its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvDiffError(
            f"cannot load the backbone {source!r} as a {name} with safetensors weights: {reason}"
        ) from None


def frozen(pipeline: Any) -> Any:
    """Freeze a pipeline's weights, put it in evaluation mode, and return it."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    limit_tokens(pipeline)
    return pipeline


def limit_tokens(pipeline: Any) -> None:
    """Limit prompts to the tokens that CLIP text encoders take, if tokenizers allow more."""
    for name in ("", "_2"):
        encoder = getattr(pipeline, f"text_encoder{name}", None)
        if isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
            tokenizer = getattr(pipeline, f"tokenizer{name}")
            most = encoder.config.max_position_embeddings
            tokenizer.model_max_length = min(tokenizer.model_max_length, most)


def _left_out(kind: type[Any], source: str) -> dict[str, Any]:
    """Return arguments that leave out parts not needed to draw images of prompts, or absent.

    Some have classes that no longer exist; a third text encoder is often left out.
    """
    unneeded = {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
        "add_watermarker": False,
    }
    taken = inspect.signature(kind).parameters
    unneeded |= dict.fromkeys(absent_parts(source))
    return {name: value for name, value in unneeded.items() if name in taken}


def _whole(name: str, source: str, part: str, dtype: torch.dtype) -> Any:
    """Load a part of a pipeline, refusing missing weights, which would be drawn at random.

    Raises:
        InvDiffError: naming the first missing weight.
    """
    model, found = getattr(diffusers, name).from_pretrained(
        source,
        subfolder=part,
        torch_dtype=dtype,
        variant=weights_variant(Path(source) / part),
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise InvDiffError(
            f"the backbone {source!r} lacks {len(missing)} weights of its {part}, such as "
            f"{missing[0]!r}: its file is damaged or not of this model."
        )
    return model


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline folder that loads with no more arguments (see ``make_portable``)."""
    pipeline.save_pretrained(folder)
    make_portable(folder)


def tokens_cut(pipeline: Any, prompts: Sequence[str]) -> dict[str, int]:
    """Return how many tokens are cut off prompts that are too long for the text encoder."""
    tokenizer = pipeline.tokenizer
    tokens = tokenizer(list(prompts), padding=False, truncation=False).input_ids
    lengths = [len(ids) - tokenizer.model_max_length for ids in tokens]
    return {prompt: cut for prompt, cut in zip(prompts, lengths, strict=True) if cut > 0}


def set_scheduler(pipeline: Any, name: str | None) -> None:
    """Swap in the diffusers scheduler class ``name``, keeping the backbone's noise schedule.

    Raises:
        InvDiffError: if diffusers has no scheduler of that name.
    """
    if name is not None:
        pipeline.scheduler = scheduler_class(name).from_config(pipeline.scheduler.config)


def scheduler_class(name: str) -> Any:
    """Return the diffusers scheduler class of a name.

    Raises:
        InvDiffError: if there is none.
    """
    scheduler = getattr(diffusers, name, None)
    if scheduler is None or not hasattr(scheduler, "add_noise"):
        raise InvDiffError(
            f"scheduler={name}: diffusers has no scheduler of that name; try DDIMScheduler, "
            "DPMSolverMultistepScheduler, UniPCMultistepScheduler or PNDMScheduler.",
            "scheduler",
        )
    return scheduler


@torch.no_grad()
def sample_antithetic_latents(
    pipeline: DiffusionPipeline,
    condition: Condition,
    null: Condition,
    indices: Sequence[int],
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    resolution: int | None = None,
) -> Tensor:
    """Draw the latents of samples, not decoded, in pairs of opposite starting noise.

    Samples 2k and 2k + 1 start from the noise of index k and its negative. What the noise decides
    comes out oppositely in many pairs, so that shares of samples vary less than those of
    independent ones. Such samples are for counting, not for reported figures.

    Args:
        pipeline: a pipeline whose denoiser may carry an adapter.
        condition: the encoded prompts, one row per sample.
        null: the encoded empty prompt, one row.
        indices: global sample indices.
        seed: seed of the whole set of samples.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance; 1 switches it off.
        resolution: side of the images in pixels; the pipeline's own if not given.

    Returns:
        ``[B, C, H, W]`` of about unit variance, on the pipeline's device.
    """
    denoiser = frozen_denoiser(pipeline, resolution)
    noise, generators = denoiser.initial_noise([index // 2 for index in indices], seed)
    signs = torch.tensor([1.0 if index % 2 == 0 else -1.0 for index in indices])
    return denoiser.draw(
        condition,
        null,
        noise * signs[:, None, None, None],
        generators,
        steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    )


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    condition: Condition,
    null: Condition,
    indices: Sequence[int],
    *,
    seed: int,
    steps: int,
    guidance_scale: float,
    resolution: int | None = None,
    **options: Any,
) -> Tensor:
    """Draw samples with classifier-free guidance, through the stock pipeline call.

    Args:
        pipeline: a pipeline whose denoiser may carry an adapter.
        condition: the encoded prompts, one row per sample.
        null: the encoded empty prompt, one row.
        indices: global sample indices, which determine the noise.
        seed: seed of the whole set of samples.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance; 1 switches it off.
        resolution: side of the images in pixels; the pipeline's own if not given.
        options: further arguments of the pipeline's call, such as ``callback_on_step_end``.

    Returns:
        uint8 images ``[B, 3, H, W]`` on the CPU.

    Raises:
        InvDiffError: if pixels are not finite.
    """
    denoiser = frozen_denoiser(pipeline, resolution)
    images = denoiser.draw(
        condition,
        null,
        *denoiser.initial_noise(indices, seed),
        steps=steps,
        guidance_scale=guidance_scale,
        **options,
    )
    finite = images.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        first = list(indices)[finite.index(False)]
        raise InvDiffError(
            f"sample {first} has pixels that are not finite (so have {finite.count(False) - 1} "
            "others of its batch); samples drawn before are kept; use "
            "trainer.precision=32-true, a lower guidance scale or another scheduler.",
            "trainer.precision",
        )
    return (images.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
