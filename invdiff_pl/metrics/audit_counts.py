"""Counts of what readers saw in samples, and figures from them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor

from invdiff_pl.metrics.bias import measured
from invdiff_pl.metrics.correction import CorrectedRates, correct_for_classifier
from invdiff_pl.metrics.counts import check_target
from invdiff_pl.metrics.intervals import wilson_interval
from invdiff_pl.metrics.measures import MEASURES
from invdiff_pl.utils.errors import InvDiffError

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, order=True)
class Cell:
    """One set of samples of all prompts.

    Attributes:
        guidance_scale: scale of classifier-free guidance.
        seed: seed of the noises.
        when: ``before`` or, with LoRAs, ``after``.
    """

    guidance_scale: float
    seed: int
    when: str


@dataclass(frozen=True)
class AuditCounts:
    """Counts of samples by prompt and class, with the figures that follow from them.

    Attributes:
        prompts: P texts.
        classes: the K classes of each attribute, by its name; for several attributes also the
            combinations of each two, as ``gender × age``.
        readings: class of each sample, int64 ``[P, N]``, by attribute and cell.
        pictures: the first T samples of each prompt, small, uint8 ``[P, T, 3, s, s]``, by cell.
        confusions: confusions of readers whose errors are known, int64 ``[K, K]``, by attribute.
        targets: wanted shares ``[P, K]`` by attribute, unless they are even.
        notes: remarks, one sentence each.
        settings: settings with which samples were drawn.
    """

    prompts: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    readings: dict[str, dict[Cell, Tensor]]
    pictures: dict[Cell, Tensor]
    confusions: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prompts: Sequence[str],
        classes: Mapping[str, Sequence[str]],
        readings: Mapping[str, dict[Cell, Tensor]],
        targets: Mapping[str, Sequence[float]] | None = None,
        **rest: Any,
    ) -> Self:
        """Build it from what each reader read, adding the combinations of each two attributes.

        Raises:
            InvDiffError: if a target has no attribute, or is not a distribution over its classes.
        """
        names = {name: tuple(values) for name, values in classes.items()}
        read = dict(readings)
        for first, second in combinations(list(classes), 2):
            both = f"{first} × {second}"
            names[both] = tuple(f"{a} × {b}" for a in names[first] for b in names[second])
            more = len(names[second])
            read[both] = {c: read[first][c] * more + read[second][c] for c in read[first]}
        aims = {}
        for name, shares in (targets or {}).items():
            if name not in names:
                raise InvDiffError(
                    f"target: there is no attribute {name!r}, expected one of {', '.join(names)}."
                )
            aims[name] = check_target(torch.tensor(shares), len(prompts), len(names[name]))
        return cls(tuple(prompts), names, read, targets=aims, **rest)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Sets of samples, in the order in which they were requested."""
        return tuple(next(iter(self.readings.values())))

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """Guidance scales, in the order in which they were requested."""
        return tuple(dict.fromkeys(cell.guidance_scale for cell in self.cells))

    @property
    def whens(self) -> tuple[str, ...]:
        """``before`` and, with LoRAs, ``after``."""
        return tuple(dict.fromkeys(cell.when for cell in self.cells))

    def counts(
        self,
        attribute: str,
        when: str = BEFORE,
        guidance_scale: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Count samples by prompt and class, int64 ``[P, K]``.

        Args:
            attribute: name of the attribute.
            when: ``before`` or ``after``.
            guidance_scale: the guidance scale; the first one requested if not given.
            seed: seed of one set of noises; all seeds together if not given.

        Raises:
            InvDiffError: if there are no such samples.
        """
        scale = self.guidance_scales[0] if guidance_scale is None else guidance_scale
        found = [
            read
            for cell, read in self.readings.get(attribute, {}).items()
            if (cell.when, cell.guidance_scale) == (when, scale) and seed in (None, cell.seed)
        ]
        if not found:
            raise InvDiffError(
                f"attribute={attribute!r}, when={when!r}, guidance_scale={scale}: expected one of "
                f"{', '.join(map(repr, self.classes))}, {', '.join(self.whens)}, "
                f"{', '.join(map(str, self.guidance_scales))}."
            )
        classes = len(self.classes[attribute])
        return torch.nn.functional.one_hot(torch.cat(found, dim=1), classes).sum(1)

    def measures(
        self, attribute: str, when: str = BEFORE, guidance_scale: float | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Compute every measure of :mod:`invdiff_pl.metrics.measures`, over all seeds.

        Args:
            attribute: name of the attribute.
            when: ``before`` or ``after``.
            guidance_scale: the guidance scale; the first one requested if not given.

        Returns:
            the result of :func:`invdiff_pl.metrics.measured` for each measure, by name.
        """
        counts = self.counts(attribute, when, guidance_scale)
        aim = self.targets.get(attribute)
        return {measure.name: measured(counts, measure, target=aim) for measure in MEASURES}

    def corrected(
        self, attribute: str, when: str = BEFORE, guidance_scale: float | None = None
    ) -> CorrectedRates | None:
        """Correct shares for the reader's errors; ``None`` if they are unknown or too large."""
        if attribute not in self.confusions:
            return None
        counts = self.counts(attribute, when, guidance_scale)
        try:
            return correct_for_classifier(counts, self.confusions[attribute])
        except InvDiffError:  # the reader hardly tells classes apart, or was not tried on one
            return None

    def tables(self) -> Iterator[tuple[str, str, float]]:
        """Yield attribute, ``when`` and guidance scale of everything that was counted."""
        for attribute in self.classes:
            for scale in self.guidance_scales:
                yield from ((attribute, when, scale) for when in self.whens)

    def to_pandas(self) -> pd.DataFrame:
        """Return a row per class of each attribute and prompt: counts, shares, 95 % intervals.

        ``corrected_share`` is corrected for the reader's errors, if they are known.
        """
        rows = []
        for attribute, when, scale in self.tables():
            counts = self.counts(attribute, when, scale)
            totals = counts.sum(1, keepdim=True).expand_as(counts)
            ends = wilson_interval(counts, totals).tolist()
            rates = self.corrected(attribute, when, scale)
            for p, prompt in enumerate(self.prompts):
                for k, name in enumerate(self.classes[attribute]):
                    count, total = int(counts[p, k]), int(totals[p, k])
                    true = None if rates is None else float(rates.shares[p, k])
                    told = (prompt, attribute, when, scale, name)
                    rows.append((*told, count, count / total, *ends[p][k], true))
        columns = ["prompt", "attribute", "when", "guidance_scale", "class", "count", "share"]
        return pd.DataFrame(rows, columns=[*columns, "low", "high", "corrected_share"])

    def figures(self) -> list[dict[str, Any]]:
        """Return every measure of every attribute, before and after, at every scale, JSON-ready."""
        return [self._figures(*table) for table in self.tables()]

    def _figures(self, attribute: str, when: str, scale: float) -> dict[str, Any]:
        rates, aim = self.corrected(attribute, when, scale), self.targets.get(attribute)
        seeds = sorted({cell.seed for cell in self.cells})
        by_seed = [self.counts(attribute, when, scale, seed).double() for seed in seeds]
        shares = [counts / counts.sum(1, keepdim=True) for counts in by_seed]
        measures = {}
        for measure, found in zip(
            MEASURES, self.measures(attribute, when, scale).values(), strict=True
        ):
            by_prompt = zip(found["value"].tolist(), found["interval"].tolist(), strict=True)
            measures[measure.name] = {
                "mean": float(found["mean"]),
                "interval": found["mean_interval"].tolist(),
                "by_seed": [float(measure(each, aim).mean()) for each in shares],
                "per_prompt": [{"value": value, "interval": ends} for value, ends in by_prompt],
            }
        corrected = None
        if rates is not None:
            corrected = {
                "bias": float(rates.mean),
                "interval": rates.mean_interval.tolist(),
                "shares": rates.shares.tolist(),
            }
        return {
            "attribute": attribute,
            "classes": list(self.classes[attribute]),
            "when": when,
            "guidance_scale": scale,
            "target": "even" if aim is None else aim.tolist(),
            "counts": self.counts(attribute, when, scale).tolist(),
            "measures": measures,
            "errors_taken_out": corrected,
        }
