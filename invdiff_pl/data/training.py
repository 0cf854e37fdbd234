"""Latents with prompts and environments, on which an adapter is trained, and their batches."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from invdiff_pl.backbones.prompts import Conditions
from invdiff_pl.data.batches import (
    BatchPlan,
    PairedEnvironmentBatches,
    Selection,
    ShuffledBatches,
)
from invdiff_pl.data.cache import RowSource
from invdiff_pl.data.datasets import LatentBatch, LatentDataset, SequentialBatches
from invdiff_pl.data.environments import Environments, held_out
from invdiff_pl.utils.errors import InvDiffError

Batches = Literal["paired", "balanced", "shuffled"]


@runtime_checkable
class TakesPrompts(Protocol):
    """A LightningModule to which a DataModule gives the denoiser's inputs for prompts."""

    def use_prompts(self, conditions: Conditions) -> None:
        """Set the inputs for every prompt and, last, the empty one, ``P + 1`` rows."""


@runtime_checkable
class TakesEnvironments(Protocol):
    """A LightningModule to which a DataModule gives the inferred environments."""

    def use_environments(self, environments: Environments) -> None:
        """Set the environments of the images that the module will be trained on."""


@dataclass(frozen=True)
class Labels:
    """Names and counts of the labels in batches of images.

    Attributes:
        prompts: the P distinct prompts, which batches number.
        attributes: the attribute's K classes, in the order of their codes; none if batches hold no
            attribute.
        counts: number of training images in each cell, int64 ``[P, K]``; equal numbers if not
            given.
        missing: why there are no attribute labels, if there are none.
    """

    prompts: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    counts: Tensor | None = None
    missing: str | None = None


@runtime_checkable
class TakesLabels(Protocol):
    """A LightningModule to which a DataModule of images gives the names of their labels."""

    def use_labels(self, labels: Labels) -> None:
        """Set the names and counts of the labels."""


class LatentDataModule(pl.LightningDataModule):
    """Base DataModule of latents, whose training batches are balanced over (prompt, environment).

    Without environments, batches are shuffled. Subclasses say where latents, prompts and
    environments come from. In ``setup``, the module in training is given what it needs beside the
    batches: see :class:`TakesPrompts` and :class:`TakesEnvironments`.

    Args:
        batch_size: global batch size, over all ranks and accumulated micro-batches.
        batches: ``paired`` (balanced over (prompt, environment), with paired draws), ``balanced``
            (the same, each image with its own draw) or ``shuffled``.
        held_out: share of each environment that training never sees, for held-out risks.
        seed: seed of the order of images and of the flips.
        workers: number of processes that load batches; with 0, the training process reads them.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        batches: Batches = "paired",
        held_out: float = 0.1,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.batches = batches
        self.held_out_share = held_out
        self.seed = seed
        self.workers = workers

    @property
    @abstractmethod
    def prompts(self) -> tuple[str, ...]:
        """The distinct prompts; batches hold numbers into them."""

    @abstractmethod
    def train_prompts(self) -> Tensor:
        """Return the number of each training image's prompt, int64 ``[N]``."""

    @abstractmethod
    def moments(self) -> RowSource:
        """Return the training images' moments, ``[N, 2, 2C, h, w]``: image, then mirror image."""

    @abstractmethod
    def conditions(self) -> Conditions:
        """Return the denoiser's inputs for every prompt and, last, the empty one, in float32."""

    @property
    @abstractmethod
    def has_environments(self) -> bool:
        """Whether training batches are balanced over environments."""

    @abstractmethod
    def inferred(self) -> Environments:
        """Return the environments of the training images."""

    def setup(self, stage: str) -> None:
        """Give the module what it needs beside the batches."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(module, TakesPrompts):
            module.use_prompts(self.conditions())
        if isinstance(module, TakesEnvironments):
            module.use_environments(self.inferred())

    def held_out(self) -> Tensor:
        """Return which training images the adapter is never trained on, bool ``[N]``."""
        assignments = self.inferred().assignments
        return held_out(self.train_prompts(), assignments, self.held_out_share, self.seed)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training batches, from the current step on."""
        return self._loader(self._latents(self._memberships()), self._training_batches())

    def training_latents(self, rows: Tensor) -> LatentBatch:
        """Return a batch of training images, unflipped, with their memberships if there are any."""
        flips = torch.zeros_like(rows)
        return self._latents(self._memberships())[Selection(rows, flips, flips, 1)]

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of every training image's latents once, distributed over ranks."""
        return self._loader(self._latents(None), self._every_row(len(self.train_prompts())))

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch to the device, except for row numbers, which only the host reads."""
        if not isinstance(batch, dict) or "row" not in batch:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        rest = {name: value for name, value in batch.items() if name != "row"}
        moved = super().transfer_batch_to_device(rest, device, dataloader_idx)
        return {"row": batch["row"], **moved}

    def _memberships(self) -> Tensor | None:
        return self.inferred().memberships if self.has_environments else None

    def _training_batches(self) -> ShuffledBatches | PairedEnvironmentBatches:
        prompts = self.train_prompts()
        if not self.has_environments:
            return ShuffledBatches(len(prompts), self._plan())
        seen = ~self.held_out()
        if self.batches == "shuffled":
            return ShuffledBatches(seen.nonzero().squeeze(1), self._plan())
        memberships = self.inferred().memberships * seen[:, None]
        paired = self.batches == "paired"
        return PairedEnvironmentBatches(prompts, memberships, self._plan(), paired)

    def _latents(self, memberships: Tensor | None) -> LatentDataset:
        return LatentDataset(self.moments(), self.train_prompts(), memberships)

    def _loader(self, dataset: Any, sampler: Sampler[Selection]) -> DataLoader:
        # Rows held on a device are gathered there, by this process.
        here = isinstance(dataset, LatentDataset) and dataset.moments.device.type != "cpu"
        workers = 0 if here else self.workers
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available() and not here,
        )

    def _every_row(self, count: int) -> SequentialBatches:
        return SequentialBatches(count, self.batch_size, *self._ranks())

    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _plan(self) -> BatchPlan:
        trainer = self.trainer
        assert trainer is not None
        micro_batches = trainer.accumulate_grad_batches
        rank, world_size = self._ranks()
        return BatchPlan(
            batch_size=self.batch_size,
            seed=self.seed,
            first=trainer.global_step * micro_batches,
            last=trainer.max_steps * micro_batches,
            micro_batches=micro_batches,
            rank=rank,
            world_size=world_size,
        )


def training_data(trainer: pl.Trainer) -> LatentDataModule:
    """Return the DataModule that a trainer trains on, for callbacks that need all of its images.

    Raises:
        ValueError: if the trainer was given a loader instead.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, LatentDataModule):
        raise InvDiffError(
            "the callbacks that measure held-out images or calibrate the scale need all images at "
            "hand: train on LatentsInMemory or another LatentDataModule, or leave them out."
        )
    return data
