"""Quality measures against counting by hand."""

from itertools import combinations

import pytest
import torch

from invdiff_pl.environments.quality import (
    adjusted_rand_index,
    auc,
    conflicting,
    environment_report,
    worst_group_precision_recall,
)

PROMPTS = torch.tensor([0] * 10 + [1] * 10)
ATTRIBUTES = torch.tensor([0] * 8 + [1] * 2 + [1] * 9 + [0])


def test_conflicting_images_are_those_of_rare_cells() -> None:
    assert conflicting(PROMPTS, ATTRIBUTES).nonzero().squeeze(1).tolist() == [8, 9, 19]


def test_balanced_prompts_have_no_conflicting_images() -> None:
    assert not conflicting(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 0, 1])).any()


def test_auc_counts_the_pairs_that_are_ordered_right_and_ties_half() -> None:
    source = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (30,), generator=source).double()
    positives = torch.rand(30, generator=source) < 0.3
    pairs = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high in scores[positives]
        for low in scores[~positives]
    ]
    assert auc(scores, positives) == pytest.approx(sum(pairs) / len(pairs))


def test_auc_tells_scores_apart_that_lie_far_out_or_close_together() -> None:
    positives = torch.tensor([False, True, False, True])
    for scores in ([1e6, 1e6 + 1, -40.0, -39.0], [0.0, 1e-12, -2e-12, -1e-12]):
        assert auc(torch.tensor(scores).double(), positives) == 0.75


def test_auc_needs_both_kinds() -> None:
    assert auc(torch.arange(3.0), torch.zeros(3, dtype=torch.bool)) is None


def test_worst_precision_and_recall_are_those_of_the_worse_prompt() -> None:
    assignments = torch.zeros(20, dtype=torch.int64)
    assignments[[8, 19, 10, 11]] = 1
    # Prompt 0: one of one right, one of two found. Prompt 1: one of three right, one of one found.
    precision, recall = worst_group_precision_recall(assignments, PROMPTS, ATTRIBUTES)
    assert precision == pytest.approx(1 / 3)
    assert recall == 0.5


def test_the_adjusted_rand_index_follows_its_definition_over_pairs() -> None:
    source = torch.Generator().manual_seed(0)
    first = torch.randint(3, (25,), generator=source)
    second = torch.where(
        torch.rand(25, generator=source) < 0.7, first, torch.randint(2, (25,), generator=source)
    )
    pairs = list(combinations(range(25), 2))
    together = [(bool(first[i] == first[j]), bool(second[i] == second[j])) for i, j in pairs]
    both = sum(a and b for a, b in together)
    rows, columns = sum(a for a, _ in together), sum(b for _, b in together)
    expected = rows * columns / len(pairs)
    index = (both - expected) / ((rows + columns) / 2 - expected)
    assert adjusted_rand_index(first, second) == pytest.approx(index)
    assert adjusted_rand_index(first, (first + 1) % 3) == pytest.approx(1.0)


def test_the_adjusted_rand_index_of_copies_is_that_of_one() -> None:
    first, second = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0, 2])
    # Of n copies: pairs of the table [[n, n, 0], [n, 2n, 0], [0, 0, n]].
    n = 50_000
    both = 4 * n * (n - 1) / 2 + 2 * n * (2 * n - 1) / 2
    sums = sum(m * n * (m * n - 1) / 2 for m in (2, 3, 1))
    expected = sums**2 / (6 * n * (6 * n - 1) / 2)
    index = (both - expected) / (sums - expected)
    assert adjusted_rand_index(first.repeat(n), second.repeat(n)) == pytest.approx(index)


def test_the_report_tells_of_quality_only_where_attributes_are() -> None:
    scores = conflicting(PROMPTS, ATTRIBUTES).double()
    memberships = torch.eye(2)[scores.long()]
    report = environment_report(scores, memberships, PROMPTS, ATTRIBUTES)
    assert report["auc"] == 1.0
    assert report["worst_group_recall"] == 1.0
    assert [entry["sizes"] for entry in report["per_prompt"]] == [[8, 2], [9, 1]]
    assert [entry["recall"] for entry in report["per_prompt"]] == [1.0, 1.0]
    unlabelled = environment_report(scores, memberships, PROMPTS, None)
    assert "auc" not in unlabelled
    assert "auc" not in unlabelled["per_prompt"][0]


def test_confidence_is_the_mean_membership_of_the_likelier_group() -> None:
    memberships = torch.full((20, 2), 0.5)
    memberships[10:] = torch.tensor([0.9, 0.1])
    report = environment_report(torch.arange(20.0), memberships, PROMPTS, None)
    assert [entry["confidence"] for entry in report["per_prompt"]] == pytest.approx([0.5, 0.9])
