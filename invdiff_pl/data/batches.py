"""Samplers of training batches, which are a pure function of the seed and the step.

Both samplers can start at any step, so a resumed run sees the batches of an uninterrupted one, and
both cut the same global batch into shares for the ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from invdiff_pl.backbones.draws import generator
from invdiff_pl.utils.errors import InvDiffError


@dataclass(frozen=True)
class BatchPlan:
    """How far training is, and which rank's share a sampler takes.

    Attributes:
        batch_size: size of the global batch, over all ranks and accumulated micro-batches.
        seed: seed of the order and the flips.
        first: first micro-batch to yield.
        last: number of micro-batches in the whole of training; a sampler's length, whatever
            ``first`` is, since a resumed trainer continues its count.
        micro_batches: number of micro-batches per optimizer step.
        rank: rank of this process.
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
                f"batch_size={self.batch_size} is the global batch and must be at least the "
                f"number of ranks times accumulated batches, {self.shares}.",
                "batch_size",
            )

    @property
    def shares(self) -> int:
        """Number of parts that a global batch is cut into."""
        return self.world_size * self.micro_batches

    def share(self, items: Tensor, micro_batch: int) -> Tensor:
        """Return the part of a global batch's items that this rank takes in a micro-batch."""
        part = (micro_batch % self.micro_batches) * self.world_size + self.rank
        return items.tensor_split(self.shares)[part]


@dataclass(frozen=True)
class Selection:
    """The rows of one rank's batch.

    Attributes:
        rows: int64 ``[B]``, rows of the split.
        flips: int64 ``[B]``, 1 if the image is mirrored.
        draws: int64 ``[B]``, which draw of (timestep, noise) of the global batch each row takes.
        draw_count: number of draws of the global batch.
        environments: int64 ``[B]``, environment for which each row was drawn; ``None`` if rows
            count for all environments in which they are members.
    """

    rows: Tensor
    flips: Tensor
    draws: Tensor
    draw_count: int
    environments: Tensor | None = None


class ShuffledBatches(Sampler[Selection]):
    """Draws every row once per epoch, in random order, each with its own draw of the noise.

    Args:
        rows: int64 ``[N]``, rows to draw from; or N, for rows 0 to N - 1.
        plan: seed, steps and ranks.
    """

    def __init__(self, rows: int | Tensor, plan: BatchPlan) -> None:
        self.rows = torch.arange(rows) if isinstance(rows, int) else rows
        self.plan = plan
        self._latest = (-1, torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.plan.last

    def __iter__(self) -> Iterator[Selection]:
        for micro_batch in range(self.plan.first, self.plan.last):
            yield self.micro_batch(micro_batch)

    def micro_batch(self, number: int) -> Selection:
        """This rank's share of a micro-batch."""
        plan = self.plan
        step = number // plan.micro_batches
        source = generator(plan.seed, "flips", step)
        flips = torch.randint(2, (plan.batch_size,), generator=source)
        items = plan.share(torch.arange(plan.batch_size), number)
        rows = self._rows(step * plan.batch_size + items)
        return Selection(rows, flips[items], items, plan.batch_size)

    def _rows(self, positions: Tensor) -> Tensor:
        count = len(self.rows)
        epochs = positions // count
        rows = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            chosen = epochs == epoch
            rows[chosen] = self._order(epoch)[positions[chosen] % count]
        return self.rows[rows]

    def _order(self, epoch: int) -> Tensor:
        if self._latest[0] != epoch:
            source = generator(self.plan.seed, "order", epoch)
            self._latest = (epoch, torch.randperm(len(self.rows), generator=source))
        return self._latest[1]


class PairedEnvironmentBatches(Sampler[Selection]):
    """Draws batches balanced over (prompt, environment), with paired draws of the noise.

    A global batch is made of ``batch_size // G`` pairs. A pair is one prompt, one draw of
    (timestep, noise), and one image for each environment of that prompt, so that differences of
    loss within a pair are differences between environments. An image is drawn for an environment
    with a probability proportional to its membership, so an environment of three images is drawn
    from as often as any other, and soft memberships give the soft group risks. If a prompt lacks
    an environment, images of its largest one fill the gap and count for that one.

    Args:
        prompt_ids: int64 ``[N]``.
        memberships: float ``[N, G]``, at least 0; rows of zeros are never drawn.
        plan: seed, steps and ranks.
        paired: whether the images of a pair share their draw; otherwise each has its own.

    Raises:
        InvDiffError: if the global batch has fewer pairs than it has shares.
    """

    def __init__(
        self, prompt_ids: Tensor, memberships: Tensor, plan: BatchPlan, paired: bool = True
    ) -> None:
        self.plan = plan
        self.paired = paired
        self.groups = memberships.shape[1]
        self.pairs = plan.batch_size // self.groups
        if self.pairs < plan.shares:
            raise InvDiffError(
                f"batch_size={plan.batch_size} gives {self.pairs} pairs of {self.groups} "
                f"environments, fewer than ranks times micro-batches, {plan.shares}: raise it.",
                "batch_size",
            )
        self.cells = _Cells(prompt_ids, memberships)

    def __len__(self) -> int:
        return self.plan.last

    def __iter__(self) -> Iterator[Selection]:
        for micro_batch in range(self.plan.first, self.plan.last):
            yield self.micro_batch(micro_batch)

    def micro_batch(self, number: int) -> Selection:
        """This rank's share of a micro-batch."""
        rows, flips, environments = self._global_batch(number // self.plan.micro_batches)
        pairs = self.plan.share(torch.arange(self.pairs), number)
        places = torch.arange(self.groups)
        draws = pairs[:, None] * self.groups + places if not self.paired else pairs[:, None]
        return Selection(
            rows[pairs].flatten(),
            flips[pairs].flatten(),
            draws.expand(-1, self.groups).flatten(),
            self.pairs if self.paired else self.pairs * self.groups,
            environments[pairs].flatten(),
        )

    def _global_batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows, flips and environments ``[pairs, G]`` of a step."""
        source = generator(self.plan.seed, "pairs", step)
        prompts = self.cells.prompts
        # Whole rounds over the prompts first, the remainder drawn without repetition.
        rounds = -(-self.pairs // prompts)
        order = torch.cat([torch.randperm(prompts, generator=source) for _ in range(rounds)])
        chosen = order[: self.pairs]
        uniform = torch.rand((self.pairs, self.groups), generator=source, dtype=torch.float64)
        flips = torch.randint(2, (self.pairs, self.groups), generator=source)
        return self.cells.draw(chosen, uniform), flips, self.cells.environments[chosen]


class _Cells:
    """The images of each (prompt, environment), to be drawn in proportion to their memberships.

    Prompts without images are left out. A cell without images is replaced by its prompt's largest.

    Attributes:
        prompts: P, the number of prompts with images.
        environments: int64 ``[P, G]``, environment whose images are in each cell.
    """

    def __init__(self, prompt_ids: Tensor, memberships: Tensor) -> None:
        drawn = memberships.sum(1) > 0
        rows = drawn.nonzero().squeeze(1)
        self.members = rows[prompt_ids[rows].argsort(stable=True)]
        weights = memberships[self.members].double()
        # For each environment, the running sum of its members' weights, prompt by prompt.
        self.ends = weights.cumsum(0).T.contiguous()
        sizes = prompt_ids[self.members].bincount()
        stops = sizes[sizes > 0].cumsum(0)
        self.prompts = len(stops)
        padded = torch.cat([torch.zeros(len(self.ends), 1, dtype=torch.float64), self.ends], dim=1)
        starts = torch.cat([stops.new_zeros(1), stops[:-1]])
        self.offsets, masses = padded[:, starts].T, (padded[:, stops] - padded[:, starts]).T
        # A cell of less than a thousandth of an image is rounding, not an environment.
        largest = masses.argmax(1, keepdim=True).expand_as(masses)
        places = torch.arange(masses.shape[1]).expand_as(masses)
        self.environments = torch.where(masses > 1e-3, places, largest)
        self.offsets = self.offsets.gather(1, self.environments)
        self.masses = masses.gather(1, self.environments)
        self.bounds = starts, stops - 1

    def draw(self, prompts: Tensor, uniform: Tensor) -> Tensor:
        """Draw rows ``[n, G]`` of prompts ``[n]`` by numbers ``[n, G]`` in [0, 1)."""
        wanted = self.offsets[prompts] + uniform * self.masses[prompts]
        environments = self.environments[prompts]
        places = torch.empty_like(environments)
        for environment, ends in enumerate(self.ends):
            chosen = environments == environment
            places[chosen] = torch.searchsorted(ends, wanted[chosen], right=True)
        # Sums are rounded: a place must not leave its prompt.
        first, last = (bound[prompts][:, None] for bound in self.bounds)
        return self.members[places.clamp(first, last)]
