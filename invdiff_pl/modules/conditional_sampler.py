"""Phase 3: guided sampling, prompts by seeds, at one or several invariant scales."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pytorch_lightning as pl
import torch
from torch import Tensor

from invdiff_pl.adapters import load_adapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.backbones.pipeline import (
    load_pipeline,
    sample_images,
    scheduler_class,
    set_scheduler,
)
from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.datasets import PromptBatch
from invdiff_pl.data.images import read_images
from invdiff_pl.data.samples import (
    MANIFEST,
    Sample,
    manifest_text,
    require_few_samples,
    sample_file,
)
from invdiff_pl.modules.common import data_module, output_folder
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import write_text
from invdiff_pl.utils.images import ImageWriter


class SampledBatch(TypedDict):
    """What callbacks see of a batch of samples."""

    index: Tensor  # int64 [B]
    prompt: Tensor  # int64 [B]
    images: dict[float, Tensor]  # invariant scale to uint8 [B, 3, H, W]


class ConditionalSampler(pl.LightningModule):
    """Samples every prompt with the same noises at each invariant scale; run with ``predict``.

    Sample i starts from noise seeded by (seed, i), so the set of images depends neither on the
    batch size nor on the number of ranks, and images at different scales can be compared one by
    one. Images that an interrupted run left are kept. Writes PNGs and ``manifest.jsonl``.

    Args:
        backbone: pipeline folder, hub id or ``asset:NAME``.
        output: folder of the samples.
        adapter: folder of a trained adapter; without one only scale 0 can be sampled.
        invariant_scales: s of ``f_theta + s G_psi``; 0 is the backbone, bit for bit.
        scheduler: class name of a diffusers scheduler; the backbone's own if not given.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 is none.
        seed: of the noises.
        max_samples: most samples to draw, of all prompts and scales; any number if not given.
        resolution: side of the images in pixels; the pipeline's own if not given.
    """

    conditions: Conditions

    def __init__(
        self,
        backbone: str,
        output: str,
        adapter: str | None = None,
        invariant_scales: tuple[float, ...] = (0.0, 1.0),
        scheduler: str | None = None,
        steps: int = 20,
        guidance_scale: float = 2.0,
        seed: int = 0,
        max_samples: int | None = None,
        resolution: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.require_settings(self.hparams)
        self.output = output
        self.scales = invariant_scales if adapter is not None else (0.0,)
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.max_samples = max_samples
        self.pipeline = load_pipeline(backbone)
        set_scheduler(self.pipeline, scheduler)
        self.frozen = frozen_denoiser(self.pipeline, resolution)
        network = self.frozen.network
        self.adapter = None if adapter is None else load_adapter(Path(adapter), network)
        # Registered so that Lightning moves the weights to the device.
        self.denoiser = network if self.adapter is None else self.adapter.denoiser
        self.vae = self.pipeline.vae

    def use_prompts(self, conditions: Conditions) -> None:
        """Take what the prompts and, last, the empty one become."""
        self.conditions = conditions

    @staticmethod
    def require_settings(settings: Mapping[str, Any]) -> None:
        """Refuse settings before a network is loaded.

        Args:
            settings: all of the constructor's arguments.

        Raises:
            InvDiffError: naming the first that is wrong.
        """
        if settings["scheduler"] is not None:
            scheduler_class(settings["scheduler"])
        if settings["steps"] < 1:
            raise InvDiffError(f"steps={settings['steps']}: expected at least 1.", "steps")

    def setup(self, stage: str) -> None:
        """Refuse too many samples; make ready to write."""
        data = data_module(self)
        require_few_samples(
            len(data.prompts), data.samples_per_prompt, len(self.scales), self.max_samples
        )
        self._writer = ImageWriter()

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> SampledBatch:
        """Samples of a batch of indices at every scale."""
        images = {scale: self._images(batch, scale) for scale in self.scales}
        return SampledBatch(index=batch["index"], prompt=batch["prompt"], images=images)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> SampledBatch:
        """The same as :meth:`predict_step`."""
        return self.predict_step(batch, batch_idx)

    def _images(self, batch: PromptBatch, scale: float) -> Tensor:
        indices = batch["index"].tolist()
        files = [Path(self.output) / sample_file(scale, index) for index in indices]
        if not files:  # the share of a rank for which there is no batch
            return torch.empty((0, 3, self._side, self._side), dtype=torch.uint8)
        if (drawn := self._drawn(files)) is not None:
            return drawn
        if self.adapter is not None:
            self.adapter.prepare_sampling(self.pipeline, scale)
        images = sample_images(
            self.pipeline,
            self.conditions[batch["prompt"]],
            self.conditions.null,
            indices,
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            resolution=self._side,
        )
        for file, image in zip(files, images, strict=True):
            self._writer.write(file, image)
        return images

    def _drawn(self, files: Sequence[Path]) -> Tensor | None:
        """The images that an interrupted run drew, if all are there and none is damaged."""
        if not all(file.is_file() for file in files):
            return None
        try:
            return read_images(files, self._side)
        except InvDiffError:
            return None

    @property
    def _side(self) -> int:
        return self.frozen.resolution

    def on_predict_batch_end(self, *unused: object) -> None:
        """Let a failed write (a full disk, say) stop the run rather than go unseen."""
        self._writer.check()

    def on_predict_end(self) -> None:
        """Wait for the last images and write the manifest."""
        self._writer.close()
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            self._write_manifest()

    on_test_batch_end = on_predict_batch_end  # type: ignore[assignment]
    on_test_end = on_predict_end

    def _write_manifest(self) -> None:
        data = data_module(self)
        per_prompt = data.samples_per_prompt
        samples = [
            Sample(
                file=str(sample_file(scale, index)),
                index=index,
                prompt=data.prompts[index // per_prompt],
                prompt_number=index // per_prompt,
                invariant_scale=scale,
                seed=self.seed,
                guidance_scale=self.guidance_scale,
                steps=self.steps,
                scheduler=type(self.pipeline.scheduler).__name__,
            )
            for scale in self.scales
            for index in range(len(data.prompts) * per_prompt)
        ]
        write_text(output_folder(self.output) / MANIFEST, manifest_text(samples))
