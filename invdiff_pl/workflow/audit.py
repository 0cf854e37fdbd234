"""Counting what a pipeline draws, as it is and with a LoRA."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from invdiff_pl.adapters.lora import activate_adapters, active_adapters
from invdiff_pl.adapters.trained import TrainedAdapter
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.metrics.bias import bias_statistics
from invdiff_pl.metrics.intervals import wilson_interval
from invdiff_pl.metrics.readers import AttributeReader
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import write_json
from invdiff_pl.workflow.generate import generate

BEFORE, AFTER = "before", "after"
_BATCH = 64


@dataclass(frozen=True)
class Audit:
    """What was counted.

    Attributes:
        prompts: P texts.
        classes: the K classes of each attribute, by its name.
        counts: int64 ``[P, K]`` by (``before`` or ``after``, attribute).
        images: what was drawn, ``before`` and, with a LoRA, ``after``, from the same noises.
    """

    prompts: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    counts: dict[tuple[str, str], Tensor]
    images: dict[str, PromptedImages]

    def statistics(self, attribute: str, when: str = BEFORE) -> dict[str, Tensor]:
        """The figures of :func:`invdiff_pl.metrics.bias_statistics`.

        Args:
            attribute: name of it.
            when: ``before`` or ``after``.

        Raises:
            ValueError: if it was not counted.
        """
        if (when, attribute) not in self.counts:
            known = ", ".join(f"{name} {when}" for when, name in self.counts)
            raise InvDiffError(f"attribute={attribute!r}, when={when!r}: expected one of {known}.")
        return bias_statistics(self.counts[when, attribute])

    def to_pandas(self) -> pd.DataFrame:
        """A row for each class of each attribute and prompt: counts, shares, 95 % intervals."""
        rows = []
        for (when, attribute), counts in self.counts.items():
            totals = counts.sum(1, keepdim=True).expand_as(counts)
            intervals = wilson_interval(counts, totals)
            for p, prompt in enumerate(self.prompts):
                for k, name in enumerate(self.classes[attribute]):
                    count, total = int(counts[p, k]), int(totals[p, k])
                    low, high = intervals[p, k].tolist()
                    rows.append((prompt, attribute, when, name, count, count / total, low, high))
        columns = ["prompt", "attribute", "when", "class", "count", "share", "low", "high"]
        return pd.DataFrame(rows, columns=columns)

    def save(self, folder: str | Path) -> Path:
        """Write ``audit.csv`` and ``audit.json`` into a folder, and give it back."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.to_pandas().to_csv(target / "audit.csv", index=False)
        figures = [
            {"attribute": attribute, "when": when, **_json(self.statistics(attribute, when))}
            for when, attribute in self.counts
        ]
        write_json(target / "audit.json", {"prompts": list(self.prompts), "figures": figures})
        return target


def audit(
    pipe: StableDiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    readers: Sequence[AttributeReader],
    lora: TrainedAdapter | str | Path | None = None,
    per_prompt: int = 64,
    steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Draw samples of each prompt and count the classes that readers see in them.

    Args:
        pipe: a loaded pipeline, with whatever LoRAs of its own; it is left as it is.
        prompts: P texts, or one.
        readers: what tells attributes, see :mod:`invdiff_pl.metrics.readers`.
        lora: a trained adapter, or the folder or file of any LoRA; with it samples are drawn and
            counted once more.
        per_prompt: samples of each prompt.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; bias grows with it.
        batch_size: images drawn together.
        seed: of the noises.
        progress: show progress bars.

    Raises:
        ValueError: if there is no reader, or one gives numbers outside its classes.

    Example:
        >>> import invdiff_pl as inv
        >>> from invdiff_pl.backbones.architecture import tiny_pipeline
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
        >>> round(float(found.statistics("light")["bias"]), 3)
        1.0
    """
    if not readers:
        raise InvDiffError("readers: expected at least one.")
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    whens: dict[str, AbstractContextManager[None]] = {BEFORE: nullcontext()}
    if lora is not None:
        whens[AFTER] = carrying(pipe, lora)
    images, counts = {}, {}
    for when, context in whens.items():
        with context:
            images[when] = generate(
                pipe,
                texts,
                per_prompt,
                steps=steps,
                guidance_scale=guidance_scale,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
        for reader in readers:
            counts[when, reader.name] = _counted(images[when], reader, len(texts), per_prompt)
    classes = {reader.name: tuple(reader.classes) for reader in readers}
    return Audit(texts, classes, counts, images)


@contextmanager
def carrying(pipe: StableDiffusionPipeline, lora: TrainedAdapter | str | Path) -> Iterator[None]:
    """A pipeline with a LoRA beside those that it has, taken out again afterwards."""
    source = Path(lora.folder if isinstance(lora, TrainedAdapter) else lora)
    name = "audited"
    networks = [part for part in (pipe.unet, pipe.text_encoder) if active_adapters(part)]
    active = {network: active_adapters(network) for network in networks}
    try:
        if source.is_file():
            pipe.load_lora_weights(str(source.parent), weight_name=source.name, adapter_name=name)
        else:
            pipe.load_lora_weights(str(source), adapter_name=name)
        for network, names in active.items():
            activate_adapters(network, [*names, name])
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvDiffError(f"lora={str(source)!r} does not fit the pipeline: {reason}") from None
    try:
        yield
    finally:
        if active:
            pipe.delete_adapters(name)
        else:
            pipe.unload_lora_weights()
        for network, names in active.items():
            activate_adapters(network, names)


def _counted(
    images: PromptedImages, reader: AttributeReader, prompts: int, per_prompt: int
) -> Tensor:
    """How many samples of each prompt are of each class, int64 ``[P, K]``.

    Raises:
        ValueError: if the reader gives a number outside its classes.
    """
    side = images[0][0].width
    batches = torch.arange(len(images)).split(_BATCH)
    read = torch.cat([reader(images.pixels(rows.tolist(), side)).cpu() for rows in batches])
    classes = len(reader.classes)
    if len(read) != len(images) or int(read.min()) < 0 or int(read.max()) >= classes:
        raise InvDiffError(
            f"readers: {reader.name!r} gave {len(read)} numbers from {int(read.min())} to "
            f"{int(read.max())} for {len(images)} pictures; expected one a picture, from 0 to "
            f"{classes - 1}."
        )
    cells = torch.arange(len(read)) // per_prompt * classes + read
    return cells.bincount(minlength=prompts * classes).view(prompts, classes)


def _json(figures: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in figures.items()}
