"""The exact partition against brute force over all partitions."""

from itertools import product

import pytest
import torch

from invdiff_pl.environments.partition import partition, partition_attribute


def _between(scores: torch.Tensor, assignments: torch.Tensor) -> float:
    """Variance between the groups' means, weighted by size."""
    groups = [scores[assignments == group].double() for group in (0, 1)]
    return sum(len(g) * float((g.mean() - scores.double().mean()) ** 2) for g in groups)


@pytest.mark.parametrize("seed", range(6))
def test_no_partition_spreads_the_scores_further(seed: int) -> None:
    scores = torch.randn(9, generator=torch.Generator().manual_seed(seed)).exp()
    partitions = [torch.tensor(labels) for labels in product((0, 1), repeat=9)]
    best = max(_between(scores, each) for each in partitions if 0 < int(each.sum()) < 9)
    found = partition(scores, torch.zeros(9, dtype=torch.int64))
    assert _between(scores, found) == pytest.approx(best, rel=1e-9)


def test_each_prompt_is_cut_by_itself_and_a_single_image_is_left_whole() -> None:
    scores = torch.tensor([1.0, 1.1, 9.0, 101.0, 109.0, 5.0])
    prompts = torch.tensor([0, 0, 0, 1, 1, 2])
    assert partition(scores, prompts).tolist() == [0, 0, 1, 0, 1, 0]


def test_neither_part_is_smaller_than_a_hundredth() -> None:
    scores = torch.cat([torch.randn(399), torch.tensor([1e6])])
    assert int(partition(scores, torch.zeros(400, dtype=torch.int64)).sum()) == 4


def test_the_papers_environments_are_never_called_a_bias() -> None:
    losses = torch.tensor([[1.0, 1.0], [1.0, 1.2], [3.0, 3.4]])
    found = partition_attribute(losses, torch.zeros(3, dtype=torch.int64))
    assert found.verdict == "untestable"
    assert found.memberships.argmax(1).tolist() == [0, 0, 1]
    assert found.shares.tolist() == [pytest.approx([2 / 3, 1 / 3])]
    assert found.conflict.argmax() == 2
