"""Environments of scores: every method against the exact one, and soft memberships."""

import pytest
import torch

from invdiff_pl.environments.assignment import Assignment, assign, cross
from invdiff_pl.environments.partition import group_spread, soft_spread
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.names import PARTITIONS


def _two_groups(count: int = 300, seed: int = 0):
    source = torch.Generator().manual_seed(seed)
    prompts = torch.arange(count) % 2
    upper = torch.rand(count, generator=source) < 0.2
    scores = 0.3 * torch.randn(count, generator=source) + 4.0 * upper
    table = 0.5 * torch.randn(count, 5, generator=source) + 2.0 * upper[:, None]
    return scores, prompts, upper, table


@pytest.mark.parametrize("method", PARTITIONS)
def test_every_method_finds_two_groups_that_are_far_apart(method: str) -> None:
    scores, _, upper, table = _two_groups()
    prompts = torch.zeros(len(scores), dtype=torch.int64)
    found = assign(scores, prompts, method=method, table=table)
    agreement = (found.assignments.bool() == upper).double().mean().item()
    assert max(agreement, 1 - agreement) > (0.95 if method != "gradient" else 0.75)
    torch.testing.assert_close(found.memberships.sum(1), torch.ones(len(scores)))


@pytest.mark.parametrize("method", ["mixture", "vector", "gradient"])
@pytest.mark.parametrize("seed", range(3))
def test_no_method_spreads_the_risks_further_than_the_exact_partition(
    method: str, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    scores = torch.randn(80, generator=source).exp()
    table = torch.randn(80, 3, generator=source)
    prompts = torch.zeros(80, dtype=torch.int64)
    for objective in ("between", "std"):
        exact = assign(scores, prompts, minimum_share=0.0, objective=objective)
        other = assign(
            scores,
            prompts,
            method=method,
            minimum_share=0.0,
            objective=objective,
            table=table,
            seed=seed,
        )
        assert other.objective <= exact.objective + 1e-9


def test_hard_memberships_have_the_spread_of_their_partition() -> None:
    scores, prompts, upper, _ = _two_groups()
    hard = torch.nn.functional.one_hot(upper.long(), 2)
    for objective in ("between", "std"):
        assert soft_spread(scores, prompts, hard, objective) == pytest.approx(
            group_spread(scores, prompts, upper.long(), objective)
        )


def test_a_mixture_is_sure_of_what_is_far_from_the_border_and_unsure_near_it() -> None:
    scores = torch.tensor([0.0, 0.1, -0.1, 0.2, 2.0, 3.9, 4.1, 4.0, 4.2, 3.8] * 20)
    found = assign(scores, torch.zeros(200, dtype=torch.int64), method="mixture")
    sure = found.memberships.max(1).values.reshape(20, 10).mean(0)
    assert sure[[0, 1, 2, 3, 5, 6, 7, 8, 9]].min() > 0.99
    assert sure[4] < sure[[0, 6]].min()


def test_unknown_methods_and_a_missing_table_are_refused() -> None:
    scores, prompts, _, _ = _two_groups()
    with pytest.raises(InvDiffError, match="exact, mixture, vector, gradient"):
        assign(scores, prompts, method="kmeans")
    with pytest.raises(InvDiffError, match="partition=vector"):
        assign(scores, prompts, method="vector")


def test_crossing_numbers_the_pairs_and_multiplies_the_memberships() -> None:
    first = Assignment(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]), 1.0)
    second = Assignment(torch.tensor([[0.3, 0.7], [0.6, 0.4]]), torch.tensor([1, 0]), 2.0)
    both = cross(first, second)
    assert both.assignments.tolist() == [2, 1]
    assert (both.memberships.argmax(1) == both.assignments).all()
    expected = torch.tensor([[0.27, 0.03, 0.63, 0.07], [0.12, 0.48, 0.08, 0.32]])
    torch.testing.assert_close(both.memberships, expected)
