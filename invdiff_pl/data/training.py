"""Latents with prompts and environments, as an adapter is trained on them, and their batches."""

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
    """A LightningModule that a DataModule hands to what prompts become for the denoiser."""

    def use_prompts(self, conditions: Conditions) -> None:
        """Take that of every prompt and, last, of the empty one, ``P + 1`` rows."""


@runtime_checkable
class TakesEnvironments(Protocol):
    """A LightningModule that a DataModule hands the inferred environments to."""

    def use_environments(self, environments: Environments) -> None:
        """Take the environments of the images that it will be trained on."""


@dataclass(frozen=True)
class Labels:
    """What batches of images hold beside them.

    Attributes:
        prompts: the P distinct ones, which batches number.
        attributes: the attribute's K classes, in the order of their codes; none where batches do
            not tell it.
        counts: images to train on of each, int64 ``[P, K]``; even numbers if not given.
        missing: why there are no attribute labels, where there are none.
    """

    prompts: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    counts: Tensor | None = None
    missing: str | None = None


@runtime_checkable
class TakesLabels(Protocol):
    """A LightningModule that a DataModule of images tells what they are labelled with."""

    def use_labels(self, labels: Labels) -> None:
        """Take them."""


class LatentDataModule(pl.LightningDataModule):
    """Training batches of latents, balanced over (prompt, environment) where there are any.

    Subclasses say where latents, prompts and environments come from. In ``setup`` the module that
    is trained is handed what it needs beside the batches: see :class:`TakesPrompts` and
    :class:`TakesEnvironments`.

    Args:
        batch_size: global, over all ranks and accumulated micro-batches.
        batches: ``paired`` (balanced over (prompt, environment), with paired draws), ``balanced``
            (the same, each image with a draw of its own) or ``shuffled``.
        held_out: share of each environment that training never sees, for held-out risks.
        seed: of the order of images and of the flips.
        workers: processes that load batches; 0 reads in the training process.
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
        """The prompt of each training image, int64 ``[N]``."""

    @abstractmethod
    def moments(self) -> RowSource:
        """The training images' latents, ``[N, 2, 2C, h, w]``: image, then mirror image."""

    @abstractmethod
    def conditions(self) -> Conditions:
        """What every prompt and, last, the empty one become for the denoiser, in float32."""

    @property
    @abstractmethod
    def has_environments(self) -> bool:
        """Whether training batches are balanced over environments."""

    @abstractmethod
    def inferred(self) -> Environments:
        """The environments of the training images."""

    def setup(self, stage: str) -> None:
        """Hand the module what it needs beside the batches."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if isinstance(module, TakesPrompts):
            module.use_prompts(self.conditions())
        if isinstance(module, TakesEnvironments):
            module.use_environments(self.inferred())

    def held_out(self) -> Tensor:
        """Which training images the adapter is never trained on, bool ``[N]``."""
        assignments = self.inferred().assignments
        return held_out(self.train_prompts(), assignments, self.held_out_share, self.seed)

    def train_dataloader(self) -> DataLoader:
        """Batches from the step that training stands at."""
        return self._loader(self._latents(self._memberships()), self._training_batches())

    def training_latents(self, rows: Tensor) -> LatentBatch:
        """Training images, unflipped, with their memberships if there are any."""
        flips = torch.zeros_like(rows)
        return self._latents(self._memberships())[Selection(rows, flips, flips, 1)]

    def predict_dataloader(self) -> DataLoader:
        """Every training image's latents once, shared by the ranks."""
        return self._loader(self._latents(None), self._every_row(len(self.train_prompts())))

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Row numbers stay on the host, which alone looks at them."""
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
        # Rows that a device holds are gathered there, by this process.
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
    """The DataModule that a trainer trains on, for callbacks that need all of its images.

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
