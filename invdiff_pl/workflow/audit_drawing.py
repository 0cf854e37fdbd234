"""Draw the samples of an audit, and read them as they are drawn."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from invdiff_pl.adapters.stack import Without, carrying
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.latents import encoded_moments
from invdiff_pl.backbones.pipeline import sample_images
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.images import to_float
from invdiff_pl.environments.features import BlockFeatures
from invdiff_pl.metrics.audit_counts import AFTER, Cell
from invdiff_pl.metrics.readers import AttributeReader
from invdiff_pl.metrics.scorers import encoder_identity
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import digest_file, digest_json
from invdiff_pl.utils.progress import telling
from invdiff_pl.utils.sheets import TILE
from invdiff_pl.utils.tensors import read_tensors, write_tensors
from invdiff_pl.workflow.generate import silent

FEATURES = "features"  # kept instead of readings when there is no reader
_SHOWN = 24  # pictures kept per prompt and cell


@dataclass(frozen=True)
class DrawingSettings:
    """How the samples of every cell are drawn, apart from what the cell itself sets."""

    prompts: tuple[str, ...]
    per_prompt: int
    steps: int
    batch_size: int


class CellDrawing:
    """Draws cells and reads them, one batch at a time.

    Args:
        pipe: the pipeline that draws.
        settings: settings of every cell.
        readers: readers of the samples; without any, features are kept.
        folder: folder of finished cells, if they are to be kept.
        progress: whether to show a progress bar.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        settings: DrawingSettings,
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
        """Return what was read in each cell, int64 ``[P, N]`` by reader, and ``pictures``."""
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
            return {FEATURES: self._features(self.denoiser.latents(moments)).half().cpu()}

    def _key(self, loras: Sequence[Path]) -> str:
        """Return a digest of what finished cells depend on, beside the cell itself."""
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
    """Return what a finished cell holds; a damaged one is drawn again."""
    if file is None or not file.is_file():
        return None
    try:
        return read_tensors(file, "it is drawn again")
    except InvDiffError as error:
        print(f"warning: {error}")
        return None


def _classes(reader: AttributeReader, images: Tensor) -> Tensor:
    """Return the class of each picture, int64 ``[B]``.

    Raises:
        InvDiffError: if the reader gives a number outside its classes.
    """
    read = reader(images).cpu()
    classes = len(reader.classes)
    if read.shape != images.shape[:1] or int(read.min()) < 0 or int(read.max()) >= classes:
        numbers = f"from {int(read.min())} to {int(read.max())}" if read.numel() else "of none"
        raise InvDiffError(
            f"readers: {reader.name!r} gave {read.numel()} numbers {numbers} for {len(images)} "
            f"pictures; expected one per picture, from 0 to {classes - 1}."
        )
    return read.long()
