"""Count what a pipeline draws, as it is and with LoRAs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from invdiff_pl.adapters.stack import lora_file
from invdiff_pl.adapters.trained import TrainedAdapter
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings, find_hidden_attributes
from invdiff_pl.environments.reader import fit_reader
from invdiff_pl.metrics.audit_counts import AFTER, BEFORE, Cell
from invdiff_pl.metrics.readers import AttributeReader
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.workflow.audit_drawing import FEATURES, CellDrawing, DrawingSettings
from invdiff_pl.workflow.audit_result import Audit

__all__ = ["AFTER", "BEFORE", "Audit", "audit"]
INFERRED = "inferred environment"
Lora = TrainedAdapter | str | Path


def audit(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    readers: Sequence[AttributeReader] = (),
    lora: Lora | Sequence[Lora] | None = None,
    per_prompt: int = 64,
    steps: int = 50,
    guidance_scale: float | Sequence[float] = 7.5,
    batch_size: int = 8,
    seed: int | Sequence[int] = 0,
    target: Mapping[str, Sequence[float]] | None = None,
    discovery: HiddenAttributeSettings | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Audit:
    """Draw samples of each prompt and count the classes that readers see in them.

    Each batch of samples is read as soon as it is drawn, and then discarded. For a reader with a
    ``confusion``, figures corrected for its errors are given beside the plain ones. Without a
    reader, environments are inferred from what the pipeline draws without ``lora``, and counted,
    with no label and no other model.

    Args:
        pipe: a loaded pipeline, with any LoRAs of its own; it is left as it is.
        prompts: P texts, or one.
        readers: classifiers of attributes, see :mod:`invdiff_pl.metrics.readers`.
        lora: a trained adapter, or the folder or safetensors file of any LoRA, or several, which
            are active together; with them, samples are drawn and counted once more, from the same
            noises.
        per_prompt: number of samples per prompt, at each guidance scale and seed.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance, one or several; bias grows with it.
        batch_size: number of images drawn together.
        seed: seed of the noises, one or several, whose samples are counted together.
        target: shares that an attribute's classes should have, by its name; even ones otherwise.
        discovery: settings for inferring environments when there is no reader.
        folder: keeps what was read at each finished guidance scale and seed, so that an
            interrupted audit can be resumed.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if prompts, readers or LoRAs cannot be used.

    Example:
        >>> import invdiff_pl as inv
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> from invdiff_pl.metrics.readers import FunctionReader
        >>> def bright(images):  # uint8 [B, 3, H, W] to class numbers [B]
        ...     return (images.float().mean((1, 2, 3)) > 255).long()
        >>> light = FunctionReader(bright, ["dark", "bright"], name="light")
        >>> pipe = tiny_pipeline(["a photo of a nurse"])
        >>> settings = {"per_prompt": 4, "steps": 1, "progress": False}
        >>> found = inv.audit(pipe, "a photo of a nurse", readers=[light], **settings)
        >>> found.to_pandas()[["class", "count", "share"]]
            class  count  share
        0    dark      4    1.0
        1  bright      0    0.0
        >>> round(float(found.measures("light")["bias"]["mean"]), 3)
        1.0
    """
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not texts or not all(text.strip() for text in texts) or len(set(texts)) < len(texts):
        raise InvDiffError("prompts: expected at least one, none empty, and none twice.")
    if per_prompt < 1:
        raise InvDiffError(f"per_prompt={per_prompt}: expected at least 1.")
    names = [reader.name for reader in readers]
    if len(set(names)) < len(names):
        raise InvDiffError(f"readers: expected different names, found {', '.join(names)}.")
    loras = () if lora is None else (lora,) if isinstance(lora, Lora) else tuple(lora)
    files = [lora_file(each) for each in loras]
    settings = DrawingSettings(texts, per_prompt, steps, batch_size)
    drawing = CellDrawing(
        pipe, settings, readers, None if folder is None else Path(folder), progress
    )
    cells = [
        Cell(float(scale), number, when)
        for when in ((BEFORE, AFTER) if files else (BEFORE,))
        for scale in _several(guidance_scale)
        for number in _several(seed)
    ]
    drawn = drawing.draw(cells, files)
    told: dict[str, Any] = {
        "pictures": {cell: found["pictures"] for cell, found in drawn.items()},
        "settings": {**asdict(settings), "loras": [str(file) for file in files]},
    }
    if not readers:
        return _inferred(texts, drawn, discovery, target, told)
    confusions = {reader.name: getattr(reader, "confusion", None) for reader in readers}
    return Audit.of(
        texts,
        {reader.name: reader.classes for reader in readers},
        {name: {cell: found[name] for cell, found in drawn.items()} for name in names},
        target,
        confusions={name: table for name, table in confusions.items() if table is not None},
        **told,
    )


def _several(values: Any) -> list[Any]:
    found = list(dict.fromkeys(values)) if isinstance(values, Sequence) else [values]
    if not found:
        raise InvDiffError("guidance_scale, seed: expected at least one.")
    return found


def _inferred(
    prompts: tuple[str, ...],
    drawn: dict[Cell, dict[str, Tensor]],
    settings: HiddenAttributeSettings | None,
    target: Mapping[str, Sequence[float]] | None,
    told: dict[str, Any],
) -> Audit:
    """Infer environments from the samples drawn before at the first scale, and read them in all.

    Raises:
        InvDiffError: if nothing was found.
    """
    first = next(iter(drawn)).guidance_scale
    known = [d[FEATURES] for c, d in drawn.items() if (c.when, c.guidance_scale) == (BEFORE, first)]
    features = torch.cat(known, dim=1)
    numbers = torch.arange(len(prompts))[:, None].expand(features.shape[:2])
    found = find_hidden_attributes(features.flatten(0, 1), numbers.flatten(), settings)
    if not found:
        raise InvDiffError(
            "readers: none were given, and the pipeline's own features show no groups in its "
            "samples; give a reader, or draw more samples with per_prompt."
        )
    memberships = found[0].memberships
    groups = memberships.shape[1]
    assignments = memberships.argmax(1)
    reader = fit_reader(features.flatten(0, 1), numbers.flatten(), assignments, groups)
    readings = {}
    for cell, values in drawn.items():
        ids = torch.arange(len(prompts)).repeat_interleave(values[FEATURES].shape[1])
        read = reader.read(values[FEATURES].flatten(0, 1), ids)
        readings[cell] = read.unflatten(0, (len(prompts), -1))
    learned = assignments.bincount(minlength=groups)
    notes = [f"Environments were inferred; best candidate: {found[0].verdict}: {found[0].reason}"]
    present = torch.nn.functional.one_hot(assignments.view(numbers.shape), groups).sum(1) > 0
    notes += [
        f"{prompts[p]!r} shows only one environment before, so no other can be recognised in it."
        for p in (present.sum(1) < 2).nonzero().squeeze(1).tolist()
    ]
    return Audit.of(
        prompts,
        {INFERRED: [f"group {group}" for group in range(groups)]},
        {INFERRED: readings},
        target,
        confusions={INFERRED: (reader.confusion * learned[:, None]).round().long()},
        notes=tuple(notes),
        **told,
    )
