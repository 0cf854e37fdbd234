from typing import Any

import pytest
import torch
from scipy.stats import binom, binomtest
from torch import Tensor

from invdiff_pl.metrics import (
    mean_interval,
    mean_share_interval,
    pairwise_bias,
    proportion_interval,
    share_interval,
    wilson_interval,
)
from invdiff_pl.utils.errors import InvDiffError


def covered(intervals: Tensor, truth: Tensor) -> Tensor:
    return (intervals[..., 0] <= truth + 1e-9) & (truth - 1e-9 <= intervals[..., 1])


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "trials"), [(0, 9), (9, 9), (3, 10), (499, 512)])
def test_wilson_interval_equals_that_of_scipy(
    successes: int, trials: int, confidence: float
) -> None:
    expected = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert proportion_interval(successes, trials, confidence) == pytest.approx(tuple(expected))


def test_wilson_interval_broadcasts_and_is_nan_without_trials() -> None:
    interval = wilson_interval(torch.tensor([[0, 1], [2, 0]]), torch.tensor([2, 1]))
    assert interval.shape == (2, 2, 2)
    assert wilson_interval(torch.tensor([0, 1]), torch.tensor([0, 1])).isnan().tolist() == [
        [True, True],
        [False, False],
    ]


def test_impossible_counts_and_confidences_are_refused() -> None:
    with pytest.raises(InvDiffError, match="between 0 and trials"):
        proportion_interval(3, 2)
    with pytest.raises(InvDiffError, match="confidence must lie between 0 and 1"):
        proportion_interval(1, 2, 95)
    with pytest.raises(InvDiffError, match="confidence must lie between 0 and 1"):
        share_interval(torch.tensor([3, 4, 5]), 0)


def test_two_class_interval_is_the_wilson_interval_folded_at_one_half() -> None:
    low, high = proportion_interval(90, 100)
    expected = torch.tensor([2 * low - 1, 2 * high - 1], dtype=torch.float64)
    torch.testing.assert_close(share_interval(torch.tensor([90, 10])), expected)
    torch.testing.assert_close(share_interval(torch.tensor([10, 90])), expected)
    low, high = proportion_interval(52, 100)
    straddling = share_interval(torch.tensor([52, 48])).tolist()
    assert straddling == pytest.approx([0, 2 * high - 1])


@pytest.mark.parametrize("n", [128, 512])
@pytest.mark.parametrize("p", [0.5, 0.51, 0.6, 0.95, 0.99])
def test_two_class_intervals_cover_the_truth_often_enough(p: float, n: int) -> None:
    first = torch.arange(n + 1)
    hits = covered(
        share_interval(torch.stack([first, n - first], -1)), torch.tensor(abs(2 * p - 1))
    )
    assert binom.pmf(first.numpy(), n, p) @ hits.double().numpy() >= 0.935  # exact coverage


@pytest.mark.parametrize("n", [128, 512])
@pytest.mark.parametrize(
    "shares",
    [
        [0.25, 0.25, 0.25, 0.25],
        [3 / 7, 2 / 7, 1 / 7, 1 / 7],
        [0.91, 0.03, 0.03, 0.03],
        [0.985, 0.005, 0.005, 0.005],
    ],
)
def test_four_class_intervals_cover_the_truth_often_enough(shares: list[Any], n: int) -> None:
    torch.manual_seed(0)
    true = torch.tensor(shares, dtype=torch.float64)
    counts = torch.distributions.Multinomial(n, true).sample((200,)).long()
    coverage = covered(share_interval(counts), pairwise_bias(true)).double().mean()
    assert coverage >= 0.93


@pytest.mark.parametrize(
    "shares",
    [
        [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]],
        [[0.95, 0.05], [0.5, 0.5]],
        [[0.95, 0.05], [0.05, 0.95]],
    ],
)
def test_intervals_of_the_mean_cover_the_truth_often_enough(shares: list[Any]) -> None:
    torch.manual_seed(0)
    true = torch.tensor(shares, dtype=torch.float64)
    counts = torch.distributions.Multinomial(256, true).sample((150,)).long()
    intervals = torch.stack([mean_share_interval(table) for table in counts])
    assert covered(intervals, pairwise_bias(true).mean()).double().mean() >= 0.93


@pytest.mark.parametrize(
    "counts",
    [
        [10, 10, 10, 10],
        [40, 0, 0, 0],
        [20, 20, 0, 0],
        [1, 0, 0, 0],
        [30, 5, 4, 1],
        [400000, 1, 1, 0],
        [5, 6, 7],
    ],
)
def test_an_interval_is_in_range_and_holds_the_estimate(counts: list[int]) -> None:
    table = torch.tensor(counts)
    low, high = share_interval(table).tolist()
    estimate = pairwise_bias(table.double() / table.sum()).item()
    assert 0 <= low <= estimate + 1e-6
    assert estimate - 1e-6 <= high <= 2 / len(counts) + 1e-9
    assert low < high


def test_balanced_counts_have_a_lower_end_of_exactly_zero() -> None:
    assert share_interval(torch.tensor([33, 31, 32, 32]))[0] == 0
    assert mean_share_interval(torch.tensor([[130, 126], [127, 129], [120, 136]]))[0] == 0


def test_intervals_shrink_with_the_square_root_of_the_sample() -> None:
    widths = share_interval(torch.tensor([60, 20, 15, 5]) * torch.tensor([[1], [100]])).diff()
    assert (widths[0] / widths[1]).item() == pytest.approx(10, rel=0.05)


def test_intervals_are_repeatable_and_leave_the_global_generator_alone() -> None:
    counts = torch.tensor([[60, 20, 15, 5], [3, 4, 5, 6]])
    before = torch.get_rng_state()
    assert torch.equal(share_interval(counts), share_interval(counts))
    torch.testing.assert_close(share_interval(counts)[1], share_interval(counts[1]))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_without_samples_has_no_interval_and_no_part_in_the_mean() -> None:
    counts = torch.tensor([[60, 20, 15, 5], [0, 0, 0, 0]])
    assert share_interval(counts).isnan().tolist() == [[False, False], [True, True]]
    torch.testing.assert_close(mean_share_interval(counts), share_interval(counts[0]))
    assert mean_share_interval(counts[1:]).isnan().all()


def test_mover_equals_the_normal_interval_for_symmetric_intervals() -> None:
    estimates = torch.tensor([0.3, 0.5, torch.nan], dtype=torch.float64)
    half = torch.tensor([0.03, 0.04, torch.nan], dtype=torch.float64)
    interval = mean_interval(estimates, torch.stack([estimates - half, estimates + half], -1))
    assert interval.tolist() == pytest.approx([0.4 - 0.025, 0.4 + 0.025])


def test_mover_keeps_the_asymmetry_of_its_parts() -> None:
    interval = mean_interval(torch.tensor([0.9, 0.9]), torch.tensor([[0.6, 0.94], [0.5, 0.93]]))
    assert interval.tolist() == pytest.approx([0.9 - 0.5 / 2, 0.9 + 0.05 / 2])


def test_an_interval_from_even_shares_begins_at_zero_without_a_sign() -> None:
    low = mean_share_interval(torch.tensor([[128, 128], [120, 136]]))[0]
    assert float(low) == 0
    assert not torch.signbit(low)
