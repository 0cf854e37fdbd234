"""A hidden attribute of prompted images, to be looked at and to be saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from invdiff_pl.data.environments import usual_first
from invdiff_pl.environments.hidden_attribute import HiddenAttribute
from invdiff_pl.environments.partition import LossPartition
from invdiff_pl.metrics.intervals import wilson_interval
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path, write_json
from invdiff_pl.utils.labels import prompt_label
from invdiff_pl.utils.sheets import TILE, contact_sheet
from invdiff_pl.utils.tensors import write_tensors

# Number of prompts with a sheet.
SHEETS = 12
_COLUMNS = 10
_HEADING = 60  # characters


class Pictures(Protocol):
    """Images with prompts that can be looked at, such as ``invdiff_pl.PromptedImages``."""

    prompts: tuple[str, ...]
    prompt_ids: Tensor

    def pixels(self, rows: Sequence[int], resolution: int) -> Tensor:
        """Read the images of B rows, uint8 ``[B, 3, resolution, resolution]``."""


@dataclass(frozen=True)
class Candidate:
    """A hidden attribute of prompted images, and the evidence for it.

    Attributes:
        attribute: what the inference found.
        images: N images of P prompts.
        names: words that tell each group from the others; empty unless a model has named them.
    """

    attribute: HiddenAttribute
    images: Pictures
    names: tuple[str, ...] = ()

    @property
    def memberships(self) -> Tensor:
        """Memberships of each image in each group, float64 ``[N, G]``; rows sum to 1."""
        return self.attribute.memberships

    @property
    def environments(self) -> Tensor:
        """Memberships in the environments that an adapter is trained on, ``[N, G]``.

        Environment 0 is the group that is most frequent in the image's own prompt.
        """
        if isinstance(self.attribute, LossPartition):
            return self.memberships
        return usual_first(self.memberships, self.images.prompt_ids)

    @property
    def conflict(self) -> Tensor:
        """Conflict of each image, high if it goes against its prompt's usual, float64 ``[N]``."""
        return self.attribute.conflict

    @property
    def shares(self) -> Tensor:
        """Shares of the groups in each prompt, float64 ``[P, G]``; rows sum to 1."""
        return self.attribute.shares

    @property
    def intervals(self) -> Tensor:
        """Wilson's 95 % intervals of the shares, float64 ``[P, G, 2]``; NaN without images."""
        counts = self.images.prompt_ids.bincount(minlength=len(self.shares))[:, None]
        return wilson_interval(self.shares.nan_to_num() * counts, counts)

    @property
    def evidence(self) -> float:
        """What the group tells about the prompt, in nats per image, at least 0."""
        return self.attribute.evidence

    @property
    def verdict(self) -> str:
        """Whether the attribute is a bias, as far as the images show."""
        return self.attribute.verdict

    @property
    def reason(self) -> str:
        """Reason for the verdict, in a sentence."""
        return self.attribute.reason

    def typical(self, prompt: int, group: int, count: int) -> list[int]:
        """Return the rows of a prompt's images that are most surely in a group, surest first."""
        here = (self.images.prompt_ids == prompt).nonzero().squeeze(1)
        members = here[self.memberships[here].argmax(1) == group]
        order = self.memberships[members, group].argsort(descending=True, stable=True)
        return members[order[:count]].tolist()

    def sheet(self, prompt: int | str) -> Image.Image:
        """Draw a sheet of the most typical images of a prompt's groups, one row per group.

        Args:
            prompt: number or text of the prompt.

        Raises:
            InvDiffError: if there is no such prompt.
        """
        prompts = self.images.prompts
        number = prompts.index(prompt) if prompt in prompts else prompt
        if not isinstance(number, int) or not 0 <= number < len(prompts):
            raise InvDiffError(
                f"prompt={prompt!r}: expected one of the {len(prompts)} prompts or its number."
            )
        groups = self.memberships[self.images.prompt_ids == number].argmax(1)
        sizes = groups.bincount(minlength=self.memberships.shape[1]).tolist()
        rows: dict[str, list[Tensor]] = {}
        for group, size in enumerate(sizes):
            chosen = self.typical(number, group, _COLUMNS)
            pixels = self.images.pixels(chosen, TILE) if chosen else ()
            name = self.names[group] if self.names else f"group {group}"
            rows[f"{name}: {size}"] = list(pixels)
        return contact_sheet(prompt_label(prompts[number], number, _HEADING), rows, _COLUMNS)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per image: prompt, likeliest group, that group's probability, conflict."""
        probability, group = self.memberships.max(1)
        texts = [self.images.prompts[number] for number in self.images.prompt_ids.tolist()]
        return pd.DataFrame(
            {
                "prompt": texts,
                "group": group.numpy(),
                "probability": probability.numpy(),
                "conflict": self.conflict.numpy(),
            }
        )

    def facts(self) -> dict[str, Any]:
        """Return the verdict, the evidence, and prompts' shares with intervals, JSON-ready."""
        found = self.attribute
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "groups": self.memberships.shape[1],
            "names": list(self.names),
            "evidence": self.evidence,
            "gain": found.gain,
            "alignment": found.alignment,
            "p_value": found.p_value,
            "shares": _numbers(self.shares),
            "intervals": _numbers(self.intervals),
        }

    def save(self, folder: str | Path, sheets: int = SHEETS) -> Path:
        """Write environments, a table, facts and contact sheets into a folder.

        ``environments.safetensors`` holds ``memberships`` and ``assignments`` of environments, of
        which 0 is what is usual in an image's own prompt; ``groups``, memberships in the groups
        that are the same in all prompts; and ``scores``, the conflict.

        Args:
            folder: folder to write to, created if missing.
            sheets: maximum number of sheets, for the prompts with most images.

        Returns:
            the folder.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        write_environments(target, self)
        self.to_pandas().to_csv(target / "images.csv", index_label="image")
        write_json(target / "candidate.json", {"prompts": list(self.images.prompts)} | self.facts())
        for place, prompt in enumerate(most_frequent(self.images, sheets)):
            with atomic_path(target / f"sheet-{place:02d}.png") as partial:
                self.sheet(prompt).save(partial, format="PNG")
        return target

    def __repr__(self) -> str:
        return (
            f"Candidate({self.memberships.shape[1]} groups, evidence {self.evidence:.3g}, "
            f"{self.verdict}: {self.reason})"
        )


def write_environments(
    folder: Path, candidate: Candidate | None, images: Pictures | None = None
) -> None:
    """Write a candidate's environments for training; without a candidate, one of all images."""
    if candidate is None:
        count = 0 if images is None else len(images.prompt_ids)
        groups, scores = torch.ones((count, 1)), torch.zeros(count).double()
        environments = groups.clone()  # safetensors refuses tensors that share memory
    else:
        groups, scores = candidate.memberships, candidate.conflict
        environments = candidate.environments
    tensors = {
        "assignments": environments.argmax(1),
        "memberships": environments.float(),
        "groups": groups.float(),
        "scores": scores,
    }
    write_tensors(folder / "environments.safetensors", tensors)


def most_frequent(images: Pictures, count: int) -> list[int]:
    """Return the numbers of the prompts with most images."""
    order = images.prompt_ids.bincount().argsort(descending=True, stable=True)
    return order[:count].tolist()


def _numbers(values: Tensor) -> Any:
    """Convert to nested lists, with ``None`` for NaN."""
    if values.dim() > 0:
        return [_numbers(value) for value in values]
    return None if values.isnan() else round(float(values), 6)
