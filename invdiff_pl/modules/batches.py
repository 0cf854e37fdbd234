"""Batches of any loader, made whole: prompts as numbers, memberships, shared draws."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.backbones.prompts import KnownPrompts
from invdiff_pl.data.batches import PairedEnvironmentBatches, ShuffledBatches
from invdiff_pl.data.datasets import LatentBatch
from invdiff_pl.utils.errors import InvDiffError


def completed(
    batch: Mapping[str, Any], prompts: KnownPrompts, groups: int, trainer: pl.Trainer
) -> LatentBatch:
    """A training batch with what a loader may leave out.

    Args:
        batch: holds ``latents`` or ``moments``; ``prompt``, texts or numbers; and ``environment``
            int64 ``[B]`` or ``membership`` ``[B, G]``. Where there is no ``draw`` each image has a
            draw of its own.
        prompts: number the texts; new ones are embedded.
        groups: G.
        trainer: tells rank and number of ranks.

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
    values: Tensor = batch["latents"] if "latents" in batch else batch["moments"]
    size, device = len(values), values.device
    if not isinstance(batch["prompt"], Tensor):
        whole["prompt"] = prompts.numbers(batch["prompt"]).to(device)
    if "membership" not in batch:
        whole["membership"] = _memberships(batch, groups)
    if "draw" not in batch:
        whole["draw"] = torch.arange(size, device=device) + trainer.global_rank * size
        whole["draw_count"] = size * trainer.world_size
    return cast(LatentBatch, whole)


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
    """This rank's micro-batches of an optimizer step, as the training loader gives them.

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
