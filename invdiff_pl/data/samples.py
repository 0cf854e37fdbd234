"""A folder of samples: its files and their manifest."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from invdiff_pl.data.images import read_images
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.images import ImageWriter

MANIFEST = "manifest.jsonl"


def require_few_samples(prompts: int, per_prompt: int, scales: int, most: int | None) -> str:
    """Say how many samples will be drawn, and check that they are not too many.

    Args:
        prompts: number of prompts.
        per_prompt: number of samples per prompt at each scale.
        scales: number of scales.
        most: maximum number of samples; any number if not given.

    Raises:
        InvDiffError: if there would be more.
    """
    total = prompts * per_prompt * scales
    told = (
        f"{prompts} prompts × {per_prompt} samples × {scales} invariant scales: {total:,} samples"
    )
    if most is not None and total > most:
        fits = most // (prompts * scales)
        lower = f"samples_per_prompt={fits}" if fits else "fewer prompts"
        raise InvDiffError(
            f"{told} would be drawn, more than max_samples={most}: give {lower}, or allow "
            f"them with max_samples={total}.",
            "max_samples",
            "samples_per_prompt",
        )
    return told


@dataclass(frozen=True)
class Sample:
    """A sample, and all that it takes to draw it again.

    Attributes:
        file: path relative to the samples' folder.
        index: number of the sample among all samples; with ``seed`` it fixes the noise.
        prompt: text of the prompt.
        prompt_number: number of the prompt among the data set's.
        invariant_scale: s; 0 is the backbone.
        seed: seed of the whole set.
        guidance_scale: scale of classifier-free guidance.
        steps: number of denoising steps.
        scheduler: class name of the diffusers scheduler.
    """

    file: str
    index: int
    prompt: str
    prompt_number: int
    invariant_scale: float
    seed: int
    guidance_scale: float
    steps: int
    scheduler: str


def scale_folder(scale: float) -> str:
    """Return the name of the folder of the samples at an invariant scale."""
    return f"scale-{scale:.2f}"


def sample_file(scale: float, index: int) -> Path:
    """Return the path of a sample, relative to the samples' folder."""
    return Path(scale_folder(scale)) / f"{index:06d}.png"


def manifest_text(samples: Sequence[Sample]) -> str:
    """Return the manifest: one JSON object per line."""
    return "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)


def read_manifest(folder: Path) -> list[Sample]:
    """Read a folder's manifest.

    Raises:
        InvDiffError: if it is missing, or a line is damaged or names a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise InvDiffError(f"{path} is missing: run the samples stage first.") from None
    except UnicodeDecodeError as error:
        raise InvDiffError(f"{path} is not UTF-8 text ({error}): rerun.") from None
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(_sample(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise InvDiffError(f"{path}, line {number} is damaged ({reason}): rerun.") from None
    return samples


def read_samples(folder: Path) -> PromptedImages:
    """Read the samples of a folder at its highest invariant scale.

    Raises:
        InvDiffError: if the manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    highest = max(sample.invariant_scale for sample in manifest)
    chosen = [sample for sample in manifest if sample.invariant_scale == highest]
    paths, prompts = [folder / s.file for s in chosen], [s.prompt for s in chosen]
    return PromptedImages(paths, prompts)


class SampleFolder:
    """Keeps samples as PNG files, written in the background, and finds those of an earlier run.

    Args:
        folder: folder of the samples.
        resolution: side of the samples in pixels.
    """

    def __init__(self, folder: Path, resolution: int) -> None:
        self.folder, self.resolution = folder, resolution
        self._writer = ImageWriter()

    def read(self, scale: float, indices: Sequence[int]) -> Tensor | None:
        """Read samples, uint8 ``[B, 3, H, W]``; ``None`` if any is missing or damaged."""
        files = self._files(scale, indices)
        if not all(file.is_file() for file in files):
            return None
        try:
            return read_images(files, self.resolution)
        except InvDiffError:
            return None

    def write(self, scale: float, indices: Sequence[int], images: Tensor) -> None:
        """Queue samples for writing, uint8 ``[B, 3, H, W]`` on the CPU."""
        for file, image in zip(self._files(scale, indices), images, strict=True):
            self._writer.write(file, image)

    def check(self) -> None:
        """Raise if a write has failed (a full disk, say), so that it does not go unnoticed."""
        self._writer.check()

    def close(self) -> None:
        """Wait for the last image."""
        self._writer.close()

    def _files(self, scale: float, indices: Sequence[int]) -> list[Path]:
        return [self.folder / sample_file(scale, index) for index in indices]


def _sample(entry: dict[str, Any]) -> Sample:
    sample = Sample(**entry)
    for field in fields(Sample):
        value = getattr(sample, field.name)
        wanted = (int, float) if field.type is float else field.type
        if not isinstance(value, wanted) or isinstance(value, bool):  # type: ignore[arg-type]
            raise ValueError(f"{field.name} is {value!r:.60}")
    path = PurePosixPath(sample.file)
    if path.is_absolute() or ".." in path.parts or "\\" in sample.file or "\0" in sample.file:
        raise ValueError(f"{sample.file!r:.60} lies outside the folder")
    return sample
