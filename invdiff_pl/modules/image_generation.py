"""Phase 0 without a data set: the frozen model draws the images that it is debiased on."""

import math
from typing import Any

import torch
from torch import Tensor

from invdiff_pl.backbones.denoiser import encoded_moments
from invdiff_pl.data.datasets import PromptBatch
from invdiff_pl.data.generated import GeneratedDataModule
from invdiff_pl.data.images import to_float
from invdiff_pl.data.samples import MANIFEST, Sample, manifest_text, sample_file
from invdiff_pl.environments.features import BlockFeatures
from invdiff_pl.environments.hidden_attribute import find_hidden_attributes
from invdiff_pl.modules.common import data_module, output_folder
from invdiff_pl.modules.conditional_sampler import ConditionalSampler, SampledBatch
from invdiff_pl.utils.files import write_json, write_text
from invdiff_pl.utils.progress import track

FACTS = "generation.json"
_ROUNDS = 3
_MARGIN = 1.1  # more than the shares seen so far say
_GROWTH = 4  # of a prompt of which only one group has been seen
_TESTABLE = ("bias", "untestable")


class ImageGeneration(ConditionalSampler):
    """Draws images of each prompt to train on; run with ``predict``.

    Features are taken as images are drawn. After the first ``per_prompt`` of each prompt a hidden
    attribute is looked for; of a prompt whose rarer group has fewer than ``least_rare`` images more
    are drawn, as many as the shares so far call for. Ranks share out the batches; images that an
    interrupted run left are kept.

    Args:
        backbone: pipeline folder, hub id or ``asset:NAME``.
        output: folder of the images and their manifest.
        scheduler: class name of a diffusers scheduler; the backbone's own if not given.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 is none.
        seed: of the noises, which are others than those of samples with the same seed.
        least_rare: images that the rarer group of each prompt should have; 0 never draws more.
        most_per_prompt: the most images of a prompt.
        max_samples: most images to draw at first, of all prompts; any number if not given.
        resolution: side of the images in pixels; the pipeline's own if not given.
    """

    def __init__(
        self,
        backbone: str,
        output: str,
        scheduler: str | None = None,
        steps: int = 20,
        guidance_scale: float = 1.0,
        seed: int = 0,
        least_rare: int = 32,
        most_per_prompt: int = 4096,
        max_samples: int | None = None,
        resolution: int | None = None,
    ) -> None:
        super().__init__(
            backbone,
            output,
            invariant_scales=(0.0,),
            scheduler=scheduler,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=-1 - seed,
            max_samples=max_samples,
            resolution=resolution,
        )
        self.least_rare = least_rare
        self.most_per_prompt = most_per_prompt

    def setup(self, stage: str) -> None:
        """Make ready to draw."""
        super().setup(stage)
        self._features: BlockFeatures | None = None
        self._found: dict[int, tuple[int, Tensor]] = {}  # prompt and features by index

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> SampledBatch:
        """Images of a batch of indices."""
        drawn = super().predict_step(batch, batch_idx)
        self._take_features(batch, drawn["images"][0.0])
        return drawn

    def on_predict_epoch_end(self) -> None:
        """Draw more of the prompts that need it, and tell of those that it did not help."""
        strategy, data = self.trainer.strategy, data_module(self)
        assert isinstance(data, GeneratedDataModule)
        told: dict[str, Any] = {}
        for left in reversed(range(_ROUNDS + 1)):
            self._share_features()
            told = strategy.broadcast(self._decide(data) if self.trainer.is_global_zero else {})
            numbers = [p for p, count in enumerate(told["more"]) for _ in range(count)]
            if not (numbers and left):
                break
            batches = data.to_draw(len(self._found), numbers)
            for index, prompt in track(batches, "drawing more images", unit="batch"):
                batch = PromptBatch(index=index, prompt=prompt.to(self.device))
                self._take_features(batch, self._images(batch, 0.0))
                self._writer.check()
        if self.trainer.is_global_zero:
            self._tell(data, told)

    def _take_features(self, batch: PromptBatch, images: Tensor) -> None:
        if not len(images):
            return
        if self._features is None:
            self._features = BlockFeatures(self.frozen, self.conditions.null)
        latents = self.frozen.latents(encoded_moments(self.vae, to_float(images)))
        features = self._features(latents).half().cpu()
        found = zip(batch["index"].tolist(), batch["prompt"].tolist(), features, strict=True)
        self._found |= {index: (prompt, features) for index, prompt, features in found}

    def _share_features(self) -> None:
        """Let every rank know those of all."""
        if self.trainer.world_size == 1:
            return
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, self._found)
        self._found = {index: found for part in parts for index, found in part.items()}

    def _decide(self, data: GeneratedDataModule) -> dict[str, Any]:
        """Images of each prompt and of its rarer group, and how many more to draw."""
        drawn = [self._found[index] for index in sorted(self._found)]
        prompts = torch.tensor([prompt for prompt, _ in drawn])
        counts = prompts.bincount(minlength=len(data.prompts))
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
        """Images to draw beside ``count``, of which ``rarer`` are of the rarer group."""
        if rarer >= self.least_rare:
            return 0
        wanted = count * self.least_rare * _MARGIN / rarer if rarer else math.inf
        return max(0, min(math.ceil(min(wanted, _GROWTH * count)), self.most_per_prompt) - count)

    def _tell(self, data: GeneratedDataModule, told: dict[str, Any]) -> None:
        lines = scarcity(data.prompts, told["counts"], told["rarer"], self.least_rare)
        total = sum(told["counts"])
        print(f"{total} images of {len(data.prompts)} prompts drawn", flush=True)
        for line in lines:
            print(f"warning: {line}", flush=True)
        facts = {name: told.get(name) for name in ("verdict", "reason", "counts", "rarer")}
        facts |= {"prompts": list(data.prompts), "warnings": lines}
        write_json(output_folder(self.output) / FACTS, facts)

    def _write_manifest(self) -> None:
        prompts = data_module(self).prompts
        samples = [
            Sample(
                file=str(sample_file(0.0, index)),
                index=index,
                prompt=prompts[number],
                prompt_number=number,
                invariant_scale=0.0,
                seed=self.seed,
                guidance_scale=self.guidance_scale,
                steps=self.steps,
                scheduler=type(self.pipeline.scheduler).__name__,
            )
            for index, (number, _) in sorted(self._found.items())
        ]
        write_text(output_folder(self.output) / MANIFEST, manifest_text(samples))


def scarcity(
    prompts: tuple[str, ...], counts: list[int], rarer: list[int] | None, least: int
) -> list[str]:
    """What to tell of prompts that hardly draw a second group, and by how much more might help.

    Args:
        prompts: P texts.
        counts: images of each.
        rarer: images of each prompt's rarer group; ``None`` where no groups were found.
        least: images that the rarer group should have.

    Example:
        >>> scarcity(("a nurse", "a pilot"), [4096, 512], [8, 40], 32)
        ["'a nurse': 8 of 4096 images are of its rarer group; about 16384 would hold 32."]
    """
    lines = []
    for prompt, count, few in zip(prompts, counts, rarer or [least] * len(counts), strict=True):
        if few == 0:
            lines.append(
                f"{prompt!r} draws one group only, in {count} images: there is nothing to balance "
                f"it with. If it draws another at all, then in less than {3 / count:.2g} of its "
                f"images (95 %): more than {math.ceil(count * least / 3)} would be needed for "
                f"{least}. Another wording, or a lower guidance scale, may draw both."
            )
        elif few < least:
            lines.append(
                f"{prompt!r}: {few} of {count} images are of its rarer group; about "
                f"{math.ceil(count * least / few)} would hold {least}."
            )
    return lines
