"""Completing the batches of any loader: prompts as numbers, memberships, shared draws."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.backbones.draws import on_device
from invdiff_pl.data.batches import PairedEnvironmentBatches, ShuffledBatches
from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.modules.common import OnPipeline
from invdiff_pl.utils.errors import InvDiffError


def completed(
    batch: Mapping[str, Any], batch_idx: int, module: OnPipeline, groups: int | None = None
) -> LatentBatch:
    """Complete a training batch with what a loader may leave out.

    Args:
        batch: batch that holds ``latents`` or ``moments``; ``prompt``, texts or numbers; and, if
            there are groups, ``environment`` int64 ``[B]`` or ``membership`` ``[B, G]``. Without
            ``draw``, each image has its own draw.
        batch_idx: number of the batch, which tells micro-batches of a step apart.
        module: module that is trained; it numbers texts.
        groups: G; memberships are ignored if not given.

    Raises:
        ValueError: if something is missing, or an environment is not below ``groups``.
    """
    if "prompt" not in batch:
        raise InvDiffError(f"the loader's batches lack 'prompt': they hold {sorted(batch)}.")
    if "latents" not in batch and "moments" not in batch:
        raise InvDiffError(
            f"the loader's batches hold neither 'latents' nor 'moments': they hold {sorted(batch)}."
        )
    whole = dict(batch)
    whole["prompt"] = module.prompt_numbers(batch["prompt"])
    if groups is not None and "membership" not in batch:
        whole["membership"] = _memberships(batch, groups)
    whole["draw"], whole["draw_count"] = shared_draws(batch, batch_idx, module)
    return cast(LatentBatch, whole)


def shared_draws(
    batch: Mapping[str, Any], batch_idx: int, module: pl.LightningModule
) -> tuple[Tensor, int]:
    """Return which draw of the global batch each image takes, int64 ``[B]``, and their number.

    Args:
        batch: batch that holds ``draw`` and ``draw_count``; otherwise each image has its own draw.
        batch_idx: number of the batch, which tells micro-batches of a step apart.
        module: module whose trainer sets the numbers of ranks and micro-batches.
    """
    if "draw" in batch:
        return batch["draw"], batch["draw_count"]
    size = len(next(value for value in batch.values() if isinstance(value, Tensor)))
    ranks, parts = module.trainer.world_size, module.trainer.accumulate_grad_batches
    part = (batch_idx % parts) * ranks + module.global_rank
    return torch.arange(size, device=module.device) + part * size, size * ranks * parts


class StepDraws(NamedTuple):
    """What is drawn for the images of a batch; images with the same ``draw`` share it.

    Attributes:
        timesteps: int64 ``[B]``.
        noises: two noises per image, ``[2, B, C, h, w]``.
        prompts: int64 ``[B]``, some of them replaced by the empty one.
    """

    timesteps: Tensor
    noises: Tensor
    prompts: Tensor


def step_draws(
    batch: LatentBatch,
    timesteps: Callable[[int, torch.Generator], Tensor],
    source: torch.Generator,
    module: OnPipeline,
    conditioning_dropout: float,
) -> StepDraws:
    """Draw for the whole global batch, so that numbers do not depend on the ranks' shares.

    Args:
        batch: batch of this rank.
        timesteps: function that draws a number of timesteps, int64.
        source: generator on the CPU.
        module: module that is trained.
        conditioning_dropout: share of draws whose prompt is replaced by the empty one.
    """
    device, draw, draws = module.device, batch["draw"], batch["draw_count"]
    given = batch["latents"] if "latents" in batch else batch["moments"].chunk(2, dim=1)[0]
    steps = on_device(timesteps(draws, source), device)[draw]
    noises = torch.randn((2, draws, *given.shape[1:]), generator=source)
    dropped = torch.rand(draws, generator=source) < conditioning_dropout
    null = len(module.conditions) - 1
    prompts = batch["prompt"].masked_fill(on_device(dropped, device)[draw], null)
    return StepDraws(steps, on_device(noises, device)[:, draw], prompts)


def _memberships(batch: Mapping[str, Any], groups: int) -> Tensor:
    if "environment" not in batch:
        raise InvDiffError(
            "the loader's batches hold neither 'environment' nor 'membership': they hold "
            f"{sorted(batch)}."
        )
    environment: Tensor = batch["environment"]
    if int(environment.max()) >= groups:
        raise InvDiffError(
            f"groups={groups}: a batch holds environment {int(environment.max())}; expected "
            "numbers below it.",
            "groups",
        )
    return one_hot(environment, groups).float()


def micro_batches(trainer: pl.Trainer, step: int) -> Iterator[LatentBatch]:
    """Yield this rank's micro-batches of an optimizer step, as the training loader gives them.

    Raises:
        ValueError: if the loader's sampler cannot give them again.
    """
    loader, count = trainer.train_dataloader, trainer.accumulate_grad_batches
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, ShuffledBatches | PairedEnvironmentBatches):
        raise InvDiffError(
            f"accumulate_grad_batches={count} needs a loader whose sampler is one of "
            "invdiff_pl.data.batches, since the objective is of the whole batch's risks: train on "
            "LatentsInMemory, or with accumulate_grad_batches=1."
        )
    for number in range(step * count, (step + 1) * count):
        yield loader.dataset[sampler.micro_batch(number)]  # type: ignore[union-attr]
