"""Which images form a training batch: a pure function of the seed and the step.

Both samplers start at any step, so a resumed run sees the batches that an undisturbed one sees,
and both cut the same global batch into shares for the ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from invdiff_pl.diffusion.draws import generator
from invdiff_pl.errors import InvDiffError


@dataclass(frozen=True)
class BatchPlan:
    """Where in training a sampler stands and whose share it takes.

    Attributes:
        batch_size: of the global batch, over all ranks and accumulated micro-batches.
        seed: of the order and the flips.
        first: first micro-batch to yield.
        last: micro-batches in the whole of training; a sampler's length, whatever ``first`` is,
            since a resumed trainer goes on counting where it was.
        micro_batches: micro-batches that make up one optimizer step.
        rank: this process.
        world_size: number of processes.
    """

    batch_size: int
    seed: int
    first: int
    last: int
    micro_batches: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < self.shares:
            raise InvDiffError(
                f"--data.batch_size={self.batch_size} is the global batch and must be at least the "
                f"number of ranks times accumulated batches, {self.shares}."
            )

    @property
    def shares(self) -> int:
        """Into how many parts a global batch is cut."""
        return self.world_size * self.micro_batches

    def share(self, items: Tensor, micro_batch: int) -> Tensor:
        """The part of a global batch's items that this rank takes in a micro-batch."""
        part = (micro_batch % self.micro_batches) * self.world_size + self.rank
        return items.tensor_split(self.shares)[part]


@dataclass(frozen=True)
class Selection:
    """The rows of one rank's batch.

    Attributes:
        rows: int64 ``[B]`` into the split.
        flips: int64 ``[B]``, 1 where the image is mirrored.
        draws: int64 ``[B]``, which draw of (timestep, noise) of the global batch each row takes.
    """

    rows: Tensor
    flips: Tensor
    draws: Tensor


class ShuffledBatches(Sampler[Selection]):
    """Every image once an epoch, in random order, each with a draw of its own."""

    def __init__(self, count: int, plan: BatchPlan) -> None:
        self.count = count
        self.plan = plan
        self._latest = (-1, torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.plan.last

    def __iter__(self) -> Iterator[Selection]:
        plan = self.plan
        for micro_batch in range(plan.first, plan.last):
            step = micro_batch // plan.micro_batches
            source = generator(plan.seed, "flips", step)
            flips = torch.randint(2, (plan.batch_size,), generator=source)
            items = plan.share(torch.arange(plan.batch_size), micro_batch)
            yield Selection(self._rows(step * plan.batch_size + items), flips[items], items)

    def _rows(self, positions: Tensor) -> Tensor:
        epochs = positions // self.count
        rows = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            chosen = epochs == epoch
            rows[chosen] = self._order(epoch)[positions[chosen] % self.count]
        return rows

    def _order(self, epoch: int) -> Tensor:
        if self._latest[0] != epoch:
            source = generator(self.plan.seed, "order", epoch)
            self._latest = (epoch, torch.randperm(self.count, generator=source))
        return self._latest[1]


class PairedEnvironmentBatches(Sampler[Selection]):
    """Batches balanced over (prompt, environment), with paired draws.

    A global batch is made of ``batch_size // G`` pairs. A pair is one prompt, one draw of
    (timestep, noise), and one image of each environment of that prompt, so that differences of
    loss within a pair are differences between environments. An environment of three images is
    drawn from as often as any other. Where a prompt lacks an environment its images fill the
    place, and count for the environment they belong to.

    Args:
        prompt_ids: int64 ``[N]``.
        environments: int64 ``[N]`` in ``[0, G)``.
        plan: seed, steps and ranks.

    Raises:
        InvDiffError: if the global batch has fewer pairs than it has shares.
    """

    def __init__(self, prompt_ids: Tensor, environments: Tensor, plan: BatchPlan) -> None:
        self.plan = plan
        self.groups = int(environments.max()) + 1
        self.pairs = plan.batch_size // self.groups
        if self.pairs < plan.shares:
            raise InvDiffError(
                f"--data.batch_size={plan.batch_size} gives {self.pairs} pairs of {self.groups} "
                f"environments, fewer than ranks times micro-batches, {plan.shares}: raise it."
            )
        self.members, self.starts, self.sizes = _cells(prompt_ids, environments, self.groups)

    def __len__(self) -> int:
        return self.plan.last

    def __iter__(self) -> Iterator[Selection]:
        for micro_batch in range(self.plan.first, self.plan.last):
            rows, flips = self._global_batch(micro_batch // self.plan.micro_batches)
            pairs = self.plan.share(torch.arange(self.pairs), micro_batch)
            yield Selection(
                rows[pairs].flatten(),
                flips[pairs].flatten(),
                pairs[:, None].expand(-1, self.groups).flatten(),
            )

    def _global_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows and flips ``[pairs, G]`` of a step."""
        source = generator(self.plan.seed, "pairs", step)
        prompts = len(self.sizes)
        # Whole rounds over the prompts first, the remainder drawn without repetition.
        rounds = -(-self.pairs // prompts)
        order = torch.cat([torch.randperm(prompts, generator=source) for _ in range(rounds)])
        chosen = order[: self.pairs]
        uniform = torch.rand((self.pairs, self.groups), generator=source, dtype=torch.float64)
        offsets = (uniform * self.sizes[chosen]).long()
        flips = torch.randint(2, (self.pairs, self.groups), generator=source)
        return self.members[self.starts[chosen] + offsets], flips


def _cells(prompt_ids: Tensor, environments: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by (prompt, environment), and start and size of each cell, ``[P, G]``.

    An empty cell is given the start and size of its prompt's largest one. Prompts without any
    image are left out.
    """
    prompts = int(prompt_ids.max()) + 1
    cell = prompt_ids * groups + environments
    members = cell.argsort(stable=True)
    sizes = cell.bincount(minlength=prompts * groups).reshape(prompts, groups)
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).reshape(prompts, groups)
    largest = sizes.argmax(1, keepdim=True)
    empty = sizes == 0
    starts = torch.where(empty, starts.gather(1, largest), starts)
    sizes = torch.where(empty, sizes.gather(1, largest), sizes)
    present = sizes[:, 0] > 0
    return members, starts[present], sizes[present]
