"""Hidden attributes of prompted images, to be looked at and to be saved."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, overload

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.data.environments import crossed, usual_first
from invdiff_pl.environments.hidden_attribute import HiddenAttribute
from invdiff_pl.environments.naming import MOST_IMAGES, WORDS, Encoder, group_words
from invdiff_pl.environments.partition import LossPartition
from invdiff_pl.metrics.intervals import wilson_interval
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import atomic_path, write_json, write_text
from invdiff_pl.utils.labels import prompt_label
from invdiff_pl.utils.sheets import TILE, contact_sheet
from invdiff_pl.utils.tensors import write_tensors

# Number of candidates saved and shown, and of prompts per candidate with a sheet.
SHOWN = 5
SHEETS = 12
_COLUMNS = 10
_BATCH = 64
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
            ValueError: if there is no such prompt.
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


class Discovery(Sequence[Candidate]):
    """The hidden attributes found in a set of images, as candidates, best first.

    Args:
        candidates: the hidden attributes, best first.
        images: the images they were found in.
    """

    def __init__(self, candidates: Sequence[HiddenAttribute], images: Pictures) -> None:
        self._candidates = tuple(Candidate(attribute, images) for attribute in candidates)
        self.images = images

    @overload
    def __getitem__(self, index: int) -> Candidate: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Candidate]: ...

    def __getitem__(self, index: int | slice) -> Candidate | Sequence[Candidate]:
        return self._candidates[index]

    def __len__(self) -> int:
        return len(self._candidates)

    @property
    def chosen(self) -> int | None:
        """Number of the first candidate that is called a bias; ``None`` if none is."""
        verdicts = [candidate.verdict for candidate in self]
        return verdicts.index("bias") if "bias" in verdicts else None

    def named(
        self, encoder: Encoder, words: Sequence[str] = WORDS, resolution: int = 224
    ) -> "Discovery":
        """Return the same candidates, with words that tell the groups of each apart.

        Args:
            encoder: a model that embeds images and words, such as
                ``invdiff_pl.metrics.clip.ClipEncoder(folder)``.
            words: words that groups may be named by; see
                :func:`~invdiff_pl.environments.naming.words_of` for those of captions.
            resolution: resolution in pixels at which images are given to the encoder.
        """
        prompts = self.images.prompt_ids
        rows = torch.randperm(len(prompts), generator=generator(0, "named images"))[:MOST_IMAGES]
        shown = [
            encoder.encode_images(self.images.pixels(part.tolist(), resolution)).cpu()
            for part in rows.split(_BATCH)
        ]
        texts = encoder.encode_prompts([f"a photo of {word}" for word in words]).cpu()
        found = Discovery((), self.images)
        found._candidates = tuple(
            replace(
                each,
                names=tuple(
                    group_words(
                        torch.cat(shown), each.memberships[rows], prompts[rows], words, texts
                    )
                ),
            )
            for each in self
        )
        return found

    def crossed(self, first: int, second: int) -> Tensor:
        """Cross two candidates' environments, to train on both: one for every pair of groups.

        Args:
            first: number of the first candidate.
            second: number of the second candidate.

        Returns:
            memberships ``[N, G H]``; environment 0 is usual in both, the last unusual in both.
        """
        return crossed(self[first].environments, self[second].environments)

    def to_pandas(self) -> pd.DataFrame:
        """Return a row per candidate and prompt: evidence, verdict, and the share of each group."""
        rows = [
            {
                "candidate": number,
                "evidence": candidate.evidence,
                "verdict": candidate.verdict,
                "prompt": prompt,
                **{f"share_{group}": share for group, share in enumerate(shares)},
            }
            for number, candidate in enumerate(self)
            for prompt, shares in zip(self.images.prompts, candidate.shares.tolist(), strict=True)
        ]
        return pd.DataFrame(rows)

    def facts(self) -> dict[str, Any]:
        """Return the verdict, the candidate to train on, and all candidates' facts, JSON-ready."""
        shown = self[:SHOWN]
        best = self[self.chosen or 0] if shown else None
        verdict = "untestable" if best is None else best.verdict
        return {
            "images": len(self.images.prompt_ids),
            "verdict": verdict,
            "bias_found": None if verdict == "untestable" else verdict == "bias",
            "reason": "features do not vary within prompts." if best is None else best.reason,
            "candidate": None if best is None else self.chosen or 0,
            "groups": 1 if best is None else best.memberships.shape[1],
            "prompts": list(self.images.prompts),
            "candidates": [candidate.facts() for candidate in shown],
        }

    def save(self, folder: str | Path, facts: dict[str, Any] | None = None) -> Path:
        """Write the first five candidates and a page that shows them side by side.

        ``environments.safetensors`` holds the first candidate that is called a bias, or else the
        first, and ``environments.json`` says which, with the facts of all five; each of them is in
        ``candidate-N``, the shares are in ``discovery.csv``, and ``discover.html`` is the page,
        which needs no other file.

        Args:
            folder: folder to write to, created if missing.
            facts: further facts for ``environments.json``.

        Returns:
            the folder.
        """
        from invdiff_pl.environments.page import discovery_page  # noqa: PLC0415 - imports this

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for number, candidate in enumerate(self[:SHOWN]):
            candidate.save(target / f"candidate-{number}")
        self.to_pandas().to_csv(target / "discovery.csv", index=False)
        write_text(target / "discover.html", discovery_page(self))
        write_environments(target, self[self.chosen or 0] if len(self) > 0 else None, self.images)
        write_json(target / "environments.json", self.facts() | (facts or {}))
        return target

    def __repr__(self) -> str:
        lines = [f"  {number}: {candidate!r}" for number, candidate in enumerate(self)]
        return "\n".join([f"Discovery of {len(self.images.prompt_ids)} images:", *lines])


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
