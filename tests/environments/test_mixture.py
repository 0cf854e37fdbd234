"""The shared mixture against the parameters it was drawn from."""

import pytest
import torch

from invdiff_pl.environments.cuts import two_means
from invdiff_pl.environments.mixture import fit_mixture
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


def test_the_cut_lies_between_the_groups_and_tells_the_upper_share() -> None:
    cut = two_means(torch.tensor([0.0, 0.2, 0.1, 5.0, 5.2]))
    assert 0.2 < cut.threshold.item() < 5.0
    assert cut.upper.item() == pytest.approx(0.4)
    assert cut.share.item() > 0.99
