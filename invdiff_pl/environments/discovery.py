"""The hidden attributes found in prompted images, best first."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import pandas as pd
import torch
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.data.environments import crossed
from invdiff_pl.environments.candidate import Candidate, Pictures, write_environments
from invdiff_pl.environments.hidden_attribute import HiddenAttribute
from invdiff_pl.environments.naming import MOST_IMAGES, WORDS, Encoder, group_words
from invdiff_pl.utils.files import write_json, write_text

# Number of candidates that are saved and shown.
SHOWN = 5
_BATCH = 64


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
