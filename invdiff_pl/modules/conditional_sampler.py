"""Phase 3: guided sampling of prompts and seeds, at one or several invariant scales."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from invdiff_pl.adapters import load_adapter
from invdiff_pl.backbones.pipeline import sample_images, scheduler_class, set_scheduler
from invdiff_pl.data.datasets import PromptBatch
from invdiff_pl.data.samples import SampleFolder
from invdiff_pl.modules.common import OnPipeline
from invdiff_pl.utils.errors import InvDiffError


class SampledBatch(TypedDict):
    """A batch of samples, as callbacks see it."""

    index: Tensor  # int64 [B]
    prompt: Tensor  # int64 [B]
    images: dict[float, Tensor]  # invariant scale to uint8 [B, 3, H, W]


class ConditionalSampler(OnPipeline):
    """Samples every prompt with the same noises at each invariant scale; run with ``predict``.

    Any loader will do whose batches hold ``prompt`` (texts, or numbers into ``prompts``) and, if
    batches are distributed over ranks, ``index``, int64 ``[B]``, the samples' numbers. Sample i
    starts from noise seeded by (seed, i), so the set of images depends neither on the batch size
    nor on the number of ranks, and images at different scales can be compared one by one.
    :class:`~invdiff_pl.callbacks.SaveSamples` writes them, and reuses those that an interrupted run
    left.

    Args:
        backbone: a loaded pipeline, or a pipeline folder, hub id or ``asset:NAME``.
        adapter: folder of a trained adapter; without one only scale 0 can be sampled.
        prompts: prompts that numbers in batches stand for, if no DataModule sets them.
        invariant_scales: values of s in ``f_theta + s G_psi``; 0 is the backbone, bit for bit.
        scheduler: class name of a diffusers scheduler; the backbone's own if not given.
        steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance; 1 is none.
        seed: seed of the noises.
        resolution: side of the images in pixels; the pipeline's own if not given.
        frozen_weights: how the weights of a backbone that is loaded here are held, see
            :func:`~invdiff_pl.backbones.pipeline.load_pipeline`.

    Attributes:
        drawn: prompt of each sample of this rank, by index.
        folder: folder that samples are kept in, if a callback sets it.

    Raises:
        ValueError: if a setting is wrong, or the backbone or the adapter cannot be loaded.

    Example:
        >>> import pytorch_lightning as pl
        >>> from torch.utils.data import DataLoader
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> rows = [{"prompt": "a nurse"}, {"prompt": "a pilot"}]
        >>> module = ConditionalSampler(tiny_pipeline(["a nurse", "a pilot"]), steps=1)
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        >>> (batch,) = trainer.predict(module, DataLoader(rows, batch_size=2))
        >>> batch["images"][0.0].shape, module.drawn
        (torch.Size([2, 3, 32, 32]), {0: 'a nurse', 1: 'a pilot'})
    """

    stage = "samples"

    def __init__(
        self,
        backbone: str | DiffusionPipeline,
        adapter: str | None = None,
        prompts: Sequence[str] = (),
        invariant_scales: tuple[float, ...] = (0.0, 1.0),
        scheduler: str | None = None,
        steps: int = 20,
        guidance_scale: float = 2.0,
        seed: int = 0,
        resolution: int | None = None,
        frozen_weights: str = "float32",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(backbone, str) else ["backbone"])
        self.require_settings(self.hparams)
        self.scales = invariant_scales if adapter is not None else (0.0,)
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.attach(backbone, prompts, resolution, frozen_weights)
        set_scheduler(self.pipeline, scheduler)
        network = self.frozen.network
        self.adapter = None if adapter is None else load_adapter(Path(adapter), network)
        # Registered, so that Lightning moves the weights to the device.
        self.denoiser = network if self.adapter is None else self.adapter.denoiser
        self.vae = self.pipeline.vae
        self.folder: SampleFolder | None = None

    @staticmethod
    def require_settings(settings: Mapping[str, Any]) -> None:
        """Check the settings before a network is loaded.

        Args:
            settings: all of the constructor's arguments.

        Raises:
            InvDiffError: naming the first setting that is wrong.
        """
        if settings["scheduler"] is not None:
            scheduler_class(settings["scheduler"])
        if settings["steps"] < 1:
            raise InvDiffError(f"steps={settings['steps']}: expected at least 1.", "steps")

    def setup(self, stage: str) -> None:
        """Forget the samples drawn before."""
        super().setup(stage)
        self.drawn: dict[int, str] = {}

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> SampledBatch:
        """Draw the samples of a batch at every scale."""
        numbers = self.prompt_numbers(batch["prompt"])
        numbered = PromptBatch(index=self._indices(batch), prompt=numbers)
        images = {scale: self.draw(numbered, scale) for scale in self.scales}
        return SampledBatch(**numbered, images=images)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> SampledBatch:
        """Do the same as :meth:`predict_step`."""
        return self.predict_step(batch, batch_idx)

    def _indices(self, batch: Mapping[str, Any]) -> Tensor:
        if "index" in batch:
            return batch["index"]
        if self.trainer.world_size > 1:
            raise InvDiffError(
                "the loader's batches lack 'index', the samples' numbers, which several ranks need."
            )
        return len(self.drawn) + torch.arange(len(batch["prompt"]))

    def draw(self, batch: PromptBatch, scale: float) -> Tensor:
        """Return the samples of a batch at a scale, uint8 ``[B, 3, H, W]`` on the CPU."""
        indices, side = batch["index"].tolist(), self.frozen.resolution
        if not indices:  # the share of a rank for which there is no batch
            return torch.empty((0, 3, side, side), dtype=torch.uint8)
        texts = [self.conditions.prompts[number] for number in batch["prompt"].tolist()]
        self.drawn |= dict(zip(indices, texts, strict=True))
        if self.folder is not None and (kept := self.folder.read(scale, indices)) is not None:
            return kept
        images = self._sampled(batch, scale)
        if self.folder is not None:
            self.folder.write(scale, indices, images)
        return images

    def _sampled(self, batch: PromptBatch, scale: float) -> Tensor:
        """Draw the samples of a batch, in the form that :meth:`draw` returns."""
        if self.adapter is not None:
            self.adapter.prepare_sampling(self.pipeline, scale)
        return sample_images(
            self.pipeline,
            self.conditions[batch["prompt"]],
            self.conditions.null,
            batch["index"].tolist(),
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            resolution=self.frozen.resolution,
        )
