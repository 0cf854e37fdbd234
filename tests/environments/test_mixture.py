"""The shared mixture against the parameters it was drawn from."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm

from invdiff_pl.environments.cuts import best_cut
from invdiff_pl.environments.mixture import fit_mixture, mixture_gains
from invdiff_pl.environments.partition import partition
from invdiff_pl.environments.soft import choose_groups


def _drawn(shares: list[list[float]], means: list[float], count: int = 4000):
    """Scores of prompts with the given shares of common groups, shifted by prompt."""
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(count) % len(shares)
    groups = torch.multinomial(torch.tensor(shares)[prompts], 1, generator=source).squeeze(1)
    noise = 0.5 * torch.randn(count, generator=source)
    scores = torch.tensor(means)[groups] + noise + torch.tensor([0.0, 7.0, -3.0])[prompts]
    return scores, prompts, groups


def _start(scores: torch.Tensor, prompts: torch.Tensor, groups: int = 2) -> torch.Tensor:
    assignments = partition(scores, prompts, groups).assignments
    return torch.nn.functional.one_hot(assignments, groups).double()[:, None]


def test_shares_and_distance_of_the_groups_are_recovered_whatever_shifts_the_prompts() -> None:
    scores, prompts, groups = _drawn([[0.9, 0.1], [0.3, 0.7]], [0.0, 2.0])
    found = fit_mixture(scores[:, None], prompts, _start(scores, prompts))
    torch.testing.assert_close(
        found.shares[:, 0, 1], torch.tensor([0.1, 0.7], dtype=torch.float64), atol=0.03, rtol=0
    )
    assert found.gap.item() == pytest.approx(2.0 / 0.5, rel=0.05)
    assert (found.memberships[:, 0, 1].round() == groups).double().mean() > 0.95


def test_own_shares_gain_likelihood_only_where_the_shares_differ() -> None:
    gains = []
    for shares in ([[0.8, 0.2], [0.2, 0.8]], [[0.5, 0.5], [0.5, 0.5]]):
        scores, prompts, _ = _drawn(shares, [0.0, 2.0])
        start = _start(scores, prompts)
        own = fit_mixture(scores[:, None], prompts, start)
        equal = fit_mixture(scores[:, None], prompts, start, equal_shares=True)
        gains.append(2 * float(own.log_likelihood - equal.log_likelihood))
    assert gains[0] > 500
    assert gains[1] < 10  # chi-squared of one degree of freedom, beyond 3 deviations


@pytest.mark.parametrize("groups", [2, 3])
def test_the_number_of_groups_is_chosen_from_the_scores(groups: int) -> None:
    shares = [[0.7, 0.3, 0.0], [0.4, 0.6, 0.0]] if groups == 2 else [[0.5, 0.3, 0.2]] * 2
    scores, prompts, _ = _drawn(shares, [0.0, 3.0, 6.0])
    partitions = {g: partition(scores, prompts, g).assignments for g in (2, 3, 4)}
    chosen, criteria = choose_groups(scores, prompts, partitions)
    assert chosen == groups
    assert set(criteria) == {2, 3, 4}


def test_gains_are_those_of_the_best_mixture_of_each_prompt_alone() -> None:
    scores, prompts, _ = _drawn([[0.85, 0.15], [0.5, 0.5]], [0.0, 2.0], 1000)
    found = mixture_gains(scores[:, None], prompts, _start(scores, prompts))[:, 0]
    for prompt in (0, 1):
        values = scores[prompts == prompt].double().numpy()

        def negative(free: np.ndarray, values: np.ndarray = values) -> float:
            share, low, high, deviation = 1 / (1 + np.exp(-free[0])), free[1], free[2], free[3]
            parts = (1 - share) * norm.pdf(values, low, deviation)
            return -float(np.log(parts + share * norm.pdf(values, high, deviation)).sum())

        starts = [
            np.array([np.log(share / (1 - share)), *np.quantile(values, [0.4, 1 - share / 2]), 0.5])
            for share in (0.1, 0.5)
        ]
        options = {"maxiter": 4000, "fatol": 1e-6, "xatol": 1e-6}
        best = max(
            -minimize(negative, s, method="Nelder-Mead", options=options).fun for s in starts
        )
        one = norm.logpdf(values, values.mean(), values.std()).sum()
        expected = (best - one - np.log(len(values))) / len(values)
        assert float(found[prompt]) == pytest.approx(expected, abs=2e-3)


def test_one_normal_group_gains_nothing_and_a_small_clear_group_more_than_two_blurred_ones() -> (
    None
):
    source = torch.Generator().manual_seed(1)
    noise = torch.randn(3, 2000, generator=source)
    small, even = torch.arange(2000) % 10 == 0, torch.arange(2000) % 2 == 0
    scores = torch.stack([noise[0], noise[1] + 5.0 * small, noise[2] + 2.2 * even], dim=1)
    prompts = torch.zeros(2000, dtype=torch.int64)
    groups = torch.stack([noise[0] > 0, small, even], dim=1).double()
    gains = mixture_gains(scores, prompts, torch.stack([1 - groups, groups], dim=2))[0]
    # A cut explains less of the variance where the group is small, however clear it is.
    assert best_cut(scores).share[1] < 0.8
    assert gains[0] < 0.005 < gains[2] < gains[1]
