"""Train an adapter with a loaded pipeline and given images."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from diffusers import DiffusionPipeline
from torch import Tensor

from invdiff_pl.adapters.trained import TrainedAdapter
from invdiff_pl.backbones.families import frozen_denoiser
from invdiff_pl.callbacks import (
    ExponentialMovingAverage,
    HeldOutSelection,
    SaveAdapter,
    ScaleCalibration,
    StopOnDivergence,
)
from invdiff_pl.callbacks.progress import progress_callback
from invdiff_pl.data.environments import Environments, HasEnvironments
from invdiff_pl.data.in_memory import LatentsInMemory
from invdiff_pl.data.prompted import PromptedImages
from invdiff_pl.modules import InvariantAdapter
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.progress import shows_bars, untold


def debias(
    pipe: DiffusionPipeline,
    images: PromptedImages,
    environments: HasEnvironments | Environments | Tensor,
    *,
    steps: int = 400,
    batch_size: int = 48,
    learning_rate: float = 1e-3,
    resolution: int | None = None,
    held_out: float = 0.1,
    calibration_samples: int = 512,
    calibration_guidance: float = 2.0,
    trainer: pl.Trainer | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> TrainedAdapter:
    """Train an adapter with which a pipeline draws the environments of each prompt evenly.

    It runs the modules and callbacks of ``invdiff train``: batches balanced over (prompt,
    environment) with paired draws, averaged weights, selection among weights by held-out risks,
    and a calibration of the scale.

    Args:
        pipe: a loaded pipeline, on any device. Its weights are not changed, and the adapter is
            removed from it afterwards.
        images: N images with prompts.
        environments: a candidate of :func:`invdiff_pl.discover`, environment numbers int64 ``[N]``
            or memberships ``[N, G]``, of which the largest counts.
        steps: number of optimizer steps, if no trainer is given.
        batch_size: global batch size, over ranks and micro-batches.
        learning_rate: peak rate of AdamW.
        resolution: side of the images in pixels; the pipeline's own if not given.
        held_out: share of each environment that is never trained on.
        calibration_samples: number of samples drawn at each scale that is tried after training;
            0 skips the calibration.
        calibration_guidance: guidance scale of these samples.
        trainer: your own trainer; its steps, devices, precision, loggers and callbacks are used,
            and callbacks are added to it.
        seed: seed of everything random.
        progress: whether to report what is measured and, if no trainer is given, to show a progress
            bar, or lines if the output is not a terminal.
        settings: further arguments of :class:`~invdiff_pl.modules.InvariantAdapter`, such as
            ``adapter_settings={"rank": 8}`` or ``objective="group_dro"``.

    Raises:
        ValueError: if the environments do not match the images, or a setting is wrong.

    Example:
        >>> import torch
        >>> import invdiff_pl as inv
        >>> from invdiff_pl.backbones.new_pipeline import tiny_pipeline
        >>> prompts = ["a photo of a nurse", "a photo of a pilot"]
        >>> images = inv.PromptedImages(torch.rand(16, 3, 32, 32), prompts * 8)
        >>> environments = torch.arange(16) // 2 % 2  # or a candidate that discover found
        >>> pipe = tiny_pipeline(prompts)
        >>> settings = {"steps": 2, "batch_size": 8, "calibration_samples": 0, "progress": False}
        >>> inv.debias(pipe, images, environments, **settings)
        TrainedAdapter(lora, 12960 parameters, trained)
    """
    if calibration_samples < 0:
        raise InvDiffError(
            f"calibration_samples={calibration_samples}: expected 0 or more.", "calibration_samples"
        )
    data = LatentsInMemory.from_images(
        pipe,
        images,
        environments,
        resolution=resolution,
        progress=progress,
        batch_size=batch_size,
        held_out=held_out,
        seed=seed,
    )
    keep = tempfile.TemporaryDirectory(prefix="invdiff-")
    selection = HeldOutSelection(seed=seed)
    calibration = ScaleCalibration(
        calibration_samples, guidance_scale=calibration_guidance, seed=seed
    )
    callbacks = [
        ExponentialMovingAverage(0.99),
        selection,
        calibration,
        SaveAdapter(keep.name),
    ]
    with borrowed(pipe), nullcontext() if progress else untold():
        settings |= {"learning_rate": learning_rate, "seed": seed, "resolution": resolution}
        module = InvariantAdapter(pipe, **settings)
        if trainer is None:
            trainer = _trainer(pipe, steps, [*callbacks, StopOnDivergence()], progress)
        else:
            trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        try:
            trainer.fit(module, datamodule=data)
        finally:
            module.adapter.detach()
    reports = {"heldout": selection.report, "calibration": calibration.report}
    return TrainedAdapter(Path(keep.name) / "adapter", reports, keep)


def _trainer(
    pipe: DiffusionPipeline, steps: int, callbacks: list[pl.Callback], progress: bool
) -> pl.Trainer:
    if steps < 1:
        raise InvDiffError(f"steps={steps}: expected at least 1.")
    device = frozen_denoiser(pipe).network.device
    return pl.Trainer(
        max_steps=steps,
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1 if device.index is None else [device.index],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress and shows_bars(),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, progress_callback()] if progress else callbacks,
    )


@contextmanager
def borrowed(pipe: DiffusionPipeline) -> Iterator[None]:
    """Restore a pipeline after training, except for what is attached to its denoiser."""
    denoiser = frozen_denoiser(pipe)
    network = denoiser.network
    parts = [network, *denoiser.other_networks]
    device = network.device
    modes = {part: part.training for whole in parts for part in whole.modules()}
    wanted = {value: value.requires_grad for whole in parts for value in whole.parameters()}
    checkpointing = network.is_gradient_checkpointing
    try:
        yield
    finally:
        denoiser.network = network
        pipe.to(device)
        if not checkpointing:
            network.disable_gradient_checkpointing()
        for part, mode in modes.items():
            part.training = mode
        for value, gradient in wanted.items():
            value.requires_grad_(gradient)
