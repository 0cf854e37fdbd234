"""The exact partition against brute force over all partitions."""

from itertools import product

import pytest
import torch

from invdiff_pl.environments.partition import group_spread, partition
from invdiff_pl.utils.errors import InvDiffError


def _all_partitions(count: int, groups: int, least: int):
    for labels in product(range(groups), repeat=count):
        assignments = torch.tensor(labels)
        if (assignments.bincount(minlength=groups) >= least).all():
            yield assignments


@pytest.mark.parametrize(
    ("groups", "objective", "least"),
    [(2, "between", 1), (2, "between", 3), (2, "std", 2), (3, "between", 1), (3, "between", 2)],
)
@pytest.mark.parametrize("seed", range(4))
def test_no_partition_spreads_the_risks_further(
    groups: int, objective: str, least: int, seed: int
) -> None:
    count = 9 if groups == 2 else 7  # 512 or 2187 partitions
    scores = torch.randn(count, generator=torch.Generator().manual_seed(seed)).exp()
    prompts = torch.zeros(count, dtype=torch.int64)
    best = max(
        group_spread(scores, prompts, assignments, objective)
        for assignments in _all_partitions(count, groups, least)
    )
    found = partition(scores, prompts, groups, least / count, objective)
    assert found.objective == pytest.approx(best, rel=1e-9)
    assert found.assignments.bincount(minlength=groups).min() >= least


def test_divide_and_conquer_agrees_with_plain_dynamic_programming() -> None:
    count, groups, least = 60, 4, 5
    scores = torch.randn(count, generator=torch.Generator().manual_seed(0)).double().exp()
    ordered = (scores.sort().values - scores.mean()).tolist()
    sums = [0.0]
    for value in ordered:
        sums.append(sums[-1] + value)
    gain = [(sums[k] ** 2 / k if k >= least else -1e9) for k in range(count + 1)]
    for _ in range(groups - 1):
        gain = [
            max(
                (gain[s] + (sums[k] - sums[s]) ** 2 / (k - s) for s in range(k - least + 1)),
                default=-1e9,
            )
            for k in range(count + 1)
        ]
    found = partition(scores, torch.zeros(count, dtype=torch.int64), groups, least / count)
    assert found.objective == pytest.approx(gain[count] / count, rel=1e-9)


def test_environments_are_numbered_by_rising_score() -> None:
    scores = torch.tensor([5.0, 1.0, 9.0, 1.1, 5.1, 9.1])
    found = partition(scores, torch.zeros(6, dtype=torch.int64), groups=3, minimum_share=0.0)
    assert found.assignments.tolist() == [1, 0, 2, 0, 1, 2]


def test_each_prompt_is_cut_by_itself() -> None:
    scores = torch.tensor([0.0, 0.0, 1.0, 100.0, 100.0, 101.0])
    prompts = torch.tensor([0, 0, 0, 1, 1, 1])
    assert partition(scores, prompts).assignments.tolist() == [0, 0, 1, 0, 0, 1]


def test_the_order_of_images_does_not_matter() -> None:
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    prompts = torch.arange(40) % 3
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = partition(scores[order], prompts[order], groups=3)
    assert torch.equal(
        shuffled.assignments, partition(scores, prompts, groups=3).assignments[order]
    )


def test_a_prompt_with_too_few_images_stays_whole() -> None:
    found = partition(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0, 1, 1]), groups=2)
    assert found.assignments.tolist() == [0, 0, 1]


def test_a_million_images_are_partitioned_exactly_within_bounds() -> None:
    scores = torch.cat([torch.zeros(900_000), torch.ones(60_000) * 5, torch.ones(40_000) * 9])
    scores = scores + 0.1 * torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    found = partition(scores, torch.zeros(1_000_000, dtype=torch.int64), groups=3)
    assert found.assignments.bincount().tolist() == [900_000, 60_000, 40_000]


def test_unknown_objectives_and_impossible_shares_are_refused() -> None:
    scores, prompts = torch.arange(4.0), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InvDiffError, match="between, std"):
        partition(scores, prompts, objective="variance")
    with pytest.raises(InvDiffError, match=r"groups=2 only"):
        partition(scores, prompts, groups=3, objective="std")
    with pytest.raises(InvDiffError, match=r"minimum_share=0\.6"):
        partition(scores, prompts, minimum_share=0.6)
