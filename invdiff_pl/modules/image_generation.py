"""Phase 0 without a data set: the frozen model draws the images that it is debiased on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from invdiff_pl.backbones.draws import generator
from invdiff_pl.backbones.latents import encoded_moments
from invdiff_pl.backbones.redrawing import redrawn
from invdiff_pl.data.datasets import PromptBatch
from invdiff_pl.data.images import to_float
from invdiff_pl.environments.features import BlockFeatures
from invdiff_pl.environments.hidden_attribute import find_hidden_attributes
from invdiff_pl.modules.common import from_all_ranks
from invdiff_pl.modules.conditional_sampler import ConditionalSampler, SampledBatch
from invdiff_pl.utils.progress import track

_ROUNDS = 3
_MARGIN = 1.1  # more images than the shares seen so far call for
_GROWTH = 4  # largest growth per round of a prompt's number of images
_TESTABLE = ("bias", "untestable")


class ImageGeneration(ConditionalSampler):
    """Draws images of each prompt to train on; run with ``predict``.

    Loaders and files are as for :class:`ConditionalSampler`. Features are taken as images are
    drawn. After the loader's images, a hidden attribute is looked for; for a prompt whose rarer
    group has fewer than ``least_rare`` images, more are drawn, as many as the shares so far call
    for. The batches are distributed over ranks.

    A model draws a rarer group worse, having seen few such images. So every image is noised to half
    of the process and drawn anew from there at the guidance scale ``clearer``, see
    :func:`~invdiff_pl.backbones.redrawing.redrawn`. Guidance from the start would make the
    rarer group rarer still.

    Args:
        backbone: a loaded pipeline, or a pipeline folder, hub id or ``asset:NAME``.
        prompts: prompts that numbers in batches stand for, if no DataModule sets them.
        scheduler: class name of a diffusers scheduler; the backbone's own if not given.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance; 1 is none.
        clearer: guidance scale of the second half of the process; if it is no larger than
            ``guidance_scale``, images stay as they were drawn first.
        seed: seed of the noises, which differ from those of samples with the same seed.
        least_rare: number of images that the rarer group of each prompt should have; with 0, no
            more are ever drawn.
        most_per_prompt: maximum number of images per prompt.
        batch_size: number of images drawn together, beyond the loader's.
        resolution: side of the images in pixels; the pipeline's own if not given.
        frozen_weights: how the weights of a backbone that is loaded here are held, see
            :func:`~invdiff_pl.backbones.pipeline.load_pipeline`.

    Attributes:
        facts: ``prompts`` and, for each, ``counts`` of images and of its ``rarer`` group;
            ``verdict`` and ``reason`` of the hidden attribute; ``warnings``, one sentence each.
    """

    stage = "data"

    def __init__(
        self,
        backbone: str | DiffusionPipeline,
        prompts: Sequence[str] = (),
        scheduler: str | None = None,
        steps: int = 20,
        guidance_scale: float = 1.0,
        clearer: float = 3.0,
        seed: int = 0,
        least_rare: int = 32,
        most_per_prompt: int = 4096,
        batch_size: int = 128,
        resolution: int | None = None,
        frozen_weights: str = "float32",
    ) -> None:
        super().__init__(
            backbone,
            prompts=prompts,
            invariant_scales=(0.0,),
            scheduler=scheduler,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=-1 - seed,
            resolution=resolution,
            frozen_weights=frozen_weights,
        )
        self.clearer = clearer
        self.least_rare = least_rare
        self.most_per_prompt = most_per_prompt
        self.batch_size = batch_size
        self.facts: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Prepare for drawing."""
        super().setup(stage)
        self._features: BlockFeatures | None = None
        self._found: dict[int, tuple[int, Tensor]] = {}  # prompt and features by index

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> SampledBatch:
        """Draw the images of a batch."""
        drawn = super().predict_step(batch, batch_idx)
        self._take_features(drawn, drawn["images"][0.0])
        return drawn

    def on_predict_epoch_end(self) -> None:
        """Draw more images of prompts that need them, and warn of those that still lack some."""
        strategy = self.trainer.strategy
        told: dict[str, Any] = {}
        for left in reversed(range(_ROUNDS + 1)):
            self._found = from_all_ranks(self._found, self.trainer)
            told = strategy.broadcast(self._decide() if self.trainer.is_global_zero else {})
            numbers = [p for p, count in enumerate(told["more"]) for _ in range(count)]
            if not (numbers and left):
                break
            batches = self._own_batches(len(self._found), numbers)
            for batch in track(batches, "drawing more images", unit="batch"):
                self._take_features(batch, self.draw(batch, 0.0))
        if self.trainer.is_global_zero:
            self._tell(told)

    def _sampled(self, batch: PromptBatch, scale: float) -> Tensor:
        """Draw the samples of a batch, and redraw them more clearly."""
        images = super()._sampled(batch, scale)
        if self.clearer <= self.guidance_scale:
            return images
        shape = self.frozen.latent_shape
        sources = (generator(self.seed, "clearer", index) for index in batch["index"].tolist())
        pixels = redrawn(
            self.frozen,
            to_float(images),
            self.conditions[batch["prompt"]],
            self.conditions.null,
            torch.stack([torch.randn(shape, generator=source) for source in sources]),
            steps=self.steps,
            guidance_scale=self.clearer,
        )
        return ((pixels + 1) * 127.5).round().to(torch.uint8)

    def _own_batches(self, first: int, numbers: Sequence[int]) -> list[PromptBatch]:
        """Return this rank's batches of images from index ``first`` on, with their prompts."""
        indices = first + torch.arange(len(numbers))
        parts = zip(
            indices.split(self.batch_size),
            torch.tensor(numbers).split(self.batch_size),
            strict=True,
        )
        own = list(parts)[self.trainer.global_rank :: self.trainer.world_size]
        return [PromptBatch(index=i, prompt=n.to(self.device)) for i, n in own]

    def _take_features(self, batch: PromptBatch | SampledBatch, images: Tensor) -> None:
        if not len(images):
            return
        if self._features is None:
            self._features = BlockFeatures(self.frozen, self.conditions.null)
        latents = self.frozen.latents(encoded_moments(self.vae, to_float(images)))
        features = self._features(latents).half().cpu()
        found = zip(batch["index"].tolist(), batch["prompt"].tolist(), features, strict=True)
        self._found |= {index: (prompt, features) for index, prompt, features in found}

    def _decide(self) -> dict[str, Any]:
        """Count the images of each prompt and of its rarer group, and how many more to draw."""
        drawn = [self._found[index] for index in sorted(self._found)]
        prompts = torch.tensor([prompt for prompt, _ in drawn])
        counts = prompts.bincount(minlength=len(self.conditions.prompts))
        none = [0] * len(counts)
        told: dict[str, Any] = {"counts": counts.tolist(), "rarer": None, "more": none}
        if self.least_rare == 0:  # whatever was found, nothing would be drawn
            return told
        features = torch.stack([features for _, features in drawn])
        candidates = find_hidden_attributes(features, prompts)
        possible = [each for each in candidates if each.verdict in _TESTABLE]
        two = [each for each in possible if each.memberships.shape[1] == 2]
        found = next(iter(two or possible), None)
        if candidates:
            told |= {"verdict": candidates[0].verdict, "reason": candidates[0].reason}
        if found is None:
            return told
        groups = found.memberships.shape[1]
        cells = prompts * groups + found.memberships.argmax(1)
        rarer = cells.bincount(minlength=len(counts) * groups).view(-1, groups).amin(1).tolist()
        more = [self._more(*pair) for pair in zip(counts.tolist(), rarer, strict=True)]
        return {**told, "rarer": rarer, "more": more}

    def _more(self, count: int, rarer: int) -> int:
        """Return how many images to draw beyond ``count``, ``rarer`` of them of the rarer group."""
        if rarer >= self.least_rare:
            return 0
        wanted = count * self.least_rare * _MARGIN / rarer if rarer else math.inf
        return max(0, min(math.ceil(min(wanted, _GROWTH * count)), self.most_per_prompt) - count)

    def _tell(self, told: dict[str, Any]) -> None:
        prompts = self.conditions.prompts
        lines = scarcity(prompts, told["counts"], told["rarer"], self.least_rare)
        print(f"{sum(told['counts'])} images of {len(prompts)} prompts drawn", flush=True)
        for line in lines:
            print(f"warning: {line}", flush=True)
        self.facts = {name: told.get(name) for name in ("verdict", "reason", "counts", "rarer")}
        self.facts |= {"prompts": list(prompts), "warnings": lines}


def scarcity(
    prompts: tuple[str, ...], counts: list[int], rarer: list[int] | None, least: int
) -> list[str]:
    """Warn of prompts that hardly draw a second group, and say how many images might do.

    Args:
        prompts: P texts.
        counts: number of images of each prompt.
        rarer: number of images of each prompt's rarer group; ``None`` if no groups were found.
        least: number of images that the rarer group should have.

    Example:
        >>> scarcity(("a nurse", "a pilot"), [4096, 512], [8, 40], 32)
        ["'a nurse': 8 of 4096 images are of its rarer group; about 16384 would hold 32."]
    """
    if rarer is None:
        return []
    lines = []
    for prompt, count, few in zip(prompts, counts, rarer, strict=True):
        if few == 0:
            lines.append(
                f"{prompt!r} shows only one group in {count} images, so there is nothing to "
                f"balance. If there is another, it is in less than {3 / count:.2g} of the images "
                f"(95 %): more than {math.ceil(count * least / 3)} images would be needed for "
                f"{least} of it. Another wording, or a lower guidance scale, may draw both."
            )
        elif few < least:
            lines.append(
                f"{prompt!r}: {few} of {count} images are of its rarer group; about "
                f"{math.ceil(count * least / few)} would hold {least}."
            )
    return lines
