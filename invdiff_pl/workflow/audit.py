"""Counting what a pipeline draws, as it is and with LoRAs."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from invdiff_pl.adapters.stack import Without, carrying, lora_file
from invdiff_pl.adapters.trained import TrainedAdapter
from invdiff_pl.backbones.denoiser import encoded_moments
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import sample_images
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.images import to_float
from invdiff_pl.environments.features import BlockFeatures
from invdiff_pl.environments.hidden_attribute import HiddenAttributeSettings, find_hidden_attributes
from invdiff_pl.environments.reader import fit_reader
from invdiff_pl.metrics.audit_counts import AFTER, BEFORE, Cell
from invdiff_pl.metrics.readers import AttributeReader
from invdiff_pl.metrics.scorers import encoder_identity
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_file, digest_json
from invdiff_pl.utils.progress import telling
from invdiff_pl.utils.sheets import TILE
from invdiff_pl.utils.tensors import read_tensors, write_tensors
from invdiff_pl.workflow.audit_result import Audit
from invdiff_pl.workflow.generate import silent

__all__ = ["AFTER", "BEFORE", "Audit", "audit"]
INFERRED = "inferred environment"
_SHOWN = 24  # pictures that are kept of each prompt and cell
_FEATURES = "features"
Lora = TrainedAdapter | str | Path


@dataclass(frozen=True)
class _Settings:
    """How samples of one cell are drawn, beside what the cell says."""

    prompts: tuple[str, ...]
    per_prompt: int
    steps: int
    batch_size: int


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

    A batch of samples is read as it is drawn, and let go. Errors of a reader that has a
    ``confusion`` are taken out beside the plain figures. Without a reader, environments are
    inferred from what the pipeline draws by itself, and counted: no label, no other model.

    Args:
        pipe: a loaded pipeline, with whatever LoRAs of its own; it is left as it is.
        prompts: P texts, or one.
        readers: what tells attributes, see :mod:`invdiff_pl.metrics.readers`.
        lora: a trained adapter, or the folder or safetensors file of any LoRA, or several, which
            are active together; with them samples are drawn and counted once more, from the same
            noises.
        per_prompt: samples of each prompt, at each guidance scale and seed.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance, one or several; bias grows with it.
        batch_size: images drawn together.
        seed: of the noises, one or several, whose samples are counted together.
        target: shares that an attribute's classes should have, by its name; even ones otherwise.
        discovery: how environments are inferred, where there is no reader.
        folder: keeps what is drawn, so that an interrupted audit goes on from there.
        progress: show a progress bar.

    Raises:
        ValueError: if prompts, readers or LoRAs cannot be used.

    Example:
        >>> import invdiff_pl as inv
        >>> from invdiff_pl.backbones.architecture import tiny_pipeline
        >>> from invdiff_pl.metrics.audit_counts import AFTER, BEFORE, Cell
    from invdiff_pl.metrics.readers import FunctionReader
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
    settings = _Settings(texts, per_prompt, steps, batch_size)
    drawing = _Drawing(pipe, settings, readers, None if folder is None else Path(folder), progress)
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


class _Drawing:
    """Draws cells and reads them, one batch at a time.

    Args:
        pipe: that draws.
        settings: of every cell.
        readers: of samples; without any, features are kept.
        folder: of finished cells.
        progress: show a progress bar.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        settings: _Settings,
        readers: Sequence[AttributeReader],
        folder: Path | None,
        progress: bool,
    ) -> None:
        self.pipe, self.settings, self.readers = pipe, settings, readers
        self.folder, self.progress = folder, progress
        self.denoiser = frozen_denoiser(pipe)
        self._features: BlockFeatures | None = None
        if not readers:
            self._features = BlockFeatures(self.denoiser, self.denoiser.condition([""]))

    def draw(self, cells: Sequence[Cell], loras: Sequence[Path]) -> dict[Cell, dict[str, Tensor]]:
        """What was read of each cell, int64 ``[P, N]`` by reader, and ``pictures``."""
        found: dict[Cell, dict[str, Tensor]] = {}
        key = self._key(loras) if self.folder is not None else ""
        for when in dict.fromkeys(cell.when for cell in cells):
            files = {cell: self._file(cell, key) for cell in cells if cell.when == when}
            known = {c: read for c, file in files.items() if (read := _finished(file)) is not None}
            found |= known
            due = [cell for cell in files if cell not in known]
            if not due:
                continue
            with silent(self.pipe), carrying(self.pipe, loras if when == AFTER else ()) as without:
                conditions = Conditions(self.denoiser.condition([*self.settings.prompts, ""]))
                for cell in due:
                    found[cell] = self._cell(cell, conditions, without)
                    if (file := files[cell]) is not None:
                        write_tensors(file, found[cell])
        return {cell: found[cell] for cell in cells}

    def _cell(self, cell: Cell, conditions: Conditions, without: Without) -> dict[str, Tensor]:
        prompts, per_prompt = len(self.settings.prompts), self.settings.per_prompt
        total = prompts * per_prompt
        read: dict[str, list[Tensor]] = {}
        name = f"{cell.when}, guidance {cell.guidance_scale:g}, seed {cell.seed}"
        with telling(name, total, "image") if self.progress else nullcontext() as reach:
            for rows in torch.arange(total).split(self.settings.batch_size):
                images = sample_images(
                    self.pipe,
                    conditions[rows // per_prompt],
                    conditions.null,
                    rows.tolist(),
                    seed=cell.seed,
                    steps=self.settings.steps,
                    guidance_scale=cell.guidance_scale,
                )
                for name, values in self._read(images, without).items():
                    read.setdefault(name, []).append(values)
                shown = images[rows % per_prompt < _SHOWN]
                small = torch.nn.functional.interpolate(shown.float(), (TILE, TILE), mode="area")
                read.setdefault("pictures", []).append(small.round().byte())
                if reach is not None:
                    reach(int(rows[-1]) + 1)
        return {n: torch.cat(values).unflatten(0, (prompts, -1)) for n, values in read.items()}

    def _read(self, images: Tensor, without: Without) -> dict[str, Tensor]:
        if self._features is None:
            return {reader.name: _classes(reader, images) for reader in self.readers}
        with without(), torch.no_grad():
            moments = encoded_moments(self.pipe.vae, to_float(images))
            return {_FEATURES: self._features(self.denoiser.latents(moments)).half().cpu()}

    def _key(self, loras: Sequence[Path]) -> str:
        """What finished cells depend on, beside the cell itself and its LoRAs."""
        networks = (self.denoiser.network, *self.denoiser.other_networks)
        readers = [
            [each.name, list(each.classes), getattr(each, "identity", None)]
            for each in self.readers
        ]
        return digest_json(
            [
                asdict(self.settings) | {"batch_size": None},
                [encoder_identity("", network, None) for network in networks],
                type(self.pipe.scheduler).__name__,
                dict(self.pipe.scheduler.config),
                readers,
                [digest_file(file) for file in loras],
            ]
        )

    def _file(self, cell: Cell, key: str) -> Path | None:
        if self.folder is None:
            return None
        scale = f"{cell.guidance_scale:g}"
        name = f"{cell.when}-guidance-{scale}-seed-{cell.seed}-{key[:12]}.safetensors"
        return self.folder / "cells" / name


def _finished(file: Path | None) -> dict[str, Tensor] | None:
    """What a finished cell holds; a damaged one is drawn again."""
    if file is None or not file.is_file():
        return None
    try:
        return read_tensors(file, "it is drawn again")
    except InvDiffError as error:
        print(f"warning: {error}")
        return None


def _classes(reader: AttributeReader, images: Tensor) -> Tensor:
    """The class of each picture, int64 ``[B]``.

    Raises:
        InvDiffError: if the reader gives a number outside its classes.
    """
    read = reader(images).cpu()
    classes = len(reader.classes)
    if read.shape != images.shape[:1] or int(read.min()) < 0 or int(read.max()) >= classes:
        numbers = f"from {int(read.min())} to {int(read.max())}" if read.numel() else "of none"
        raise InvDiffError(
            f"readers: {reader.name!r} gave {read.numel()} numbers {numbers} for {len(images)} "
            f"pictures; expected one a picture, from 0 to {classes - 1}."
        )
    return read.long()


def _inferred(
    prompts: tuple[str, ...],
    drawn: dict[Cell, dict[str, Tensor]],
    settings: HiddenAttributeSettings | None,
    target: Mapping[str, Sequence[float]] | None,
    told: dict[str, Any],
) -> Audit:
    """Environments of what is drawn before at the first scale, read in everything.

    Raises:
        InvDiffError: if nothing was found.
    """
    first = next(iter(drawn)).guidance_scale
    known = [
        d[_FEATURES] for c, d in drawn.items() if (c.when, c.guidance_scale) == (BEFORE, first)
    ]
    features = torch.cat(known, dim=1)
    numbers = torch.arange(len(prompts))[:, None].expand(features.shape[:2])
    found = find_hidden_attributes(features.flatten(0, 1), numbers.flatten(), settings)
    if not found:
        raise InvDiffError(
            "readers: none were given, and the pipeline's own features show no groups in what it "
            "draws; give a reader, or more samples with per_prompt."
        )
    memberships = found[0].memberships
    groups = memberships.shape[1]
    assignments = memberships.argmax(1)
    reader = fit_reader(features.flatten(0, 1), numbers.flatten(), assignments, groups)
    readings = {}
    for cell, values in drawn.items():
        ids = torch.arange(len(prompts)).repeat_interleave(values[_FEATURES].shape[1])
        read = reader.read(values[_FEATURES].flatten(0, 1), ids)
        readings[cell] = read.unflatten(0, (len(prompts), -1))
    learned = assignments.bincount(minlength=groups)
    notes = [f"Environments were inferred, best candidate: {found[0].verdict}, {found[0].reason}"]
    present = torch.nn.functional.one_hot(assignments.view(numbers.shape), groups).sum(1) > 0
    notes += [
        f"{prompts[p]!r} draws one environment only before, so another would not be seen in it."
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
