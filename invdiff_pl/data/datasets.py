"""Data sets whose items are whole batches, selected by a :class:`Selection` of rows."""

from collections.abc import Iterator
from typing import TypedDict, cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import Dataset, Sampler

from invdiff_pl.backbones.draws import on_device
from invdiff_pl.data.batches import Selection
from invdiff_pl.data.cache import RowSource, ShardedTensor


class LatentBatch(TypedDict, total=False):
    """What training and inference see of images, which includes no attribute."""

    row: Tensor  # int64 [B], in the split; always on the CPU
    prompt: Tensor  # int64 [B]
    moments: Tensor  # [B, 2C, h, w], posterior mean and log variance
    latents: Tensor  # [B, C, h, w] of unit variance, if a loader gives these instead
    draw: Tensor  # int64 [B], which draw of (timestep, noise) of the global batch
    draw_count: int  # number of draws of the global batch
    membership: Tensor  # float32 [B, G], in the inferred environments


class LatentDataset(Dataset[LatentBatch]):
    """Cached latents of one split, selected by a :class:`Selection`, one batch at a time.

    A row that was drawn for one environment is a member of that one alone. If the latents are held
    on a device, the whole batch is on it, except for the row numbers.
    """

    def __init__(
        self, moments: RowSource, prompt_ids: Tensor, memberships: Tensor | None = None
    ) -> None:
        self.moments = moments
        self.prompt_ids = prompt_ids
        self.memberships = memberships

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, selection: Selection) -> LatentBatch:
        batch = LatentBatch(
            row=selection.rows,
            prompt=self.prompt_ids[selection.rows],
            moments=self.moments.gather(selection.rows, selection.flips),
            draw=selection.draws,
            draw_count=selection.draw_count,
        )
        if self.memberships is None:
            return self._placed(batch)
        if selection.environments is None:
            batch["membership"] = self.memberships[selection.rows]
        else:
            groups = self.memberships.shape[1]
            batch["membership"] = one_hot(selection.environments, groups).float()
        return self._placed(batch)

    def _placed(self, batch: LatentBatch) -> LatentBatch:
        device = self.moments.device
        placed = {
            name: on_device(value, device) if isinstance(value, Tensor) and name != "row" else value
            for name, value in batch.items()
        }
        return cast(LatentBatch, placed)


class SequentialBatches(Sampler[Selection]):
    """Yields every row once, unflipped, in order; each rank takes every ``world_size``-th batch.

    Whole batches are distributed over ranks: which rows are computed together changes the last bits
    of results, and must not depend on the number of ranks. A rank without a batch gets one of no
    rows, since otherwise Lightning would leave it out of the loop, at whose end the others wait.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int) -> None:
        own = torch.arange(count).split(batch_size)[rank::world_size]
        self.batches = own or (torch.arange(0),)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Selection]:
        for rows in self.batches:
            yield Selection(rows, torch.zeros_like(rows), rows, len(rows))


class LabelledBatch(TypedDict, total=False):
    """What the classifiers that score samples are trained on."""

    images: Tensor  # uint8 [B, 3, H, W]
    prompt: Tensor  # int64 [B]
    attribute: Tensor  # int64 [B]
    draw: Tensor  # int64 [B], position in the global batch
    draw_count: int  # size of the global batch


class ImageDataset(Dataset[LabelledBatch]):
    """Cached images of one split, with attributes only if they are given."""

    def __init__(
        self, images: ShardedTensor, prompt_ids: Tensor, attributes: Tensor | None = None
    ) -> None:
        self.images = images
        self.prompt_ids = prompt_ids
        self.attributes = attributes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, selection: Selection) -> LabelledBatch:
        images = self.images.gather(selection.rows)
        flipped = selection.flips.bool()
        images[flipped] = images[flipped].flip(-1)
        batch = LabelledBatch(
            images=images,
            prompt=self.prompt_ids[selection.rows],
            draw=selection.draws,
            draw_count=selection.draw_count,
        )
        if self.attributes is not None:
            batch["attribute"] = self.attributes[selection.rows]
        return batch


class PromptBatch(TypedDict):
    """Which samples to draw."""

    index: Tensor  # int64 [B], of the sample among all samples
    prompt: Tensor  # int64 [B]


class PromptDataset(Dataset[PromptBatch]):
    """Samples to draw; sample number i belongs to prompt ``i // samples_per_prompt``."""

    def __init__(self, samples_per_prompt: int) -> None:
        self.samples_per_prompt = samples_per_prompt

    def __getitem__(self, selection: Selection) -> PromptBatch:
        rows = selection.rows
        return PromptBatch(index=rows, prompt=rows // self.samples_per_prompt)
