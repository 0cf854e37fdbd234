"""Held-out risks: weights by hand, the bound as a property, fair picking of images."""

import torch
from torch.nn.functional import one_hot

from invdiff_pl.objectives import build_rule
from invdiff_pl.objectives.heldout import (
    HeldOutObjective,
    bin_figures,
    held_out_weights,
    round_robin,
    timestep_bins,
    worst_risk_bound,
)


def test_no_risk_is_above_the_bound_and_two_groups_reach_it() -> None:
    source = torch.Generator().manual_seed(0)
    for groups in (2, 3, 5):
        for _ in range(200):
            risks = torch.rand(groups, generator=source, dtype=torch.float64) ** 4
            assert risks.max() <= worst_risk_bound(risks) + 1e-12
    pair = torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert worst_risk_bound(pair).item() == 4.0
    # One group alone above equal others reaches it, too.
    assert abs(worst_risk_bound(torch.tensor([1.0, 1.0, 4.0])).item() - 4.0) < 1e-6


def test_prompts_count_alike_and_incomplete_ones_not() -> None:
    prompts = torch.tensor([0, 0, 0, 1, 1, 2])
    assignments = torch.tensor([0, 0, 1, 0, 1, 0])
    weights = held_out_weights(prompts, one_hot(assignments, 2))
    expected = [[0.25, 0], [0.25, 0], [0, 0.5], [0.5, 0], [0, 0.5], [0, 0]]
    assert weights.tolist() == expected


def test_without_a_complete_prompt_all_count() -> None:
    prompts, assignments = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1])
    weights = held_out_weights(prompts, one_hot(assignments, 2))
    assert weights.tolist() == [[0.5, 0], [0.5, 0], [0, 1]]


def test_images_are_dealt_over_prompts_and_environments_in_turn() -> None:
    prompts = torch.tensor([0] * 50 + [1] * 50)
    assignments = torch.tensor(([0] * 45 + [1] * 5) * 2)
    rows, places = round_robin(prompts, assignments, torch.arange(100), 24)
    cells = (prompts * 2 + assignments)[rows].bincount()
    # Five of each small cell are all there are; the rest is shared by the large ones.
    assert cells.tolist() == [7, 5, 7, 5]
    assert places.bincount().tolist() == [4] * 5 + [2] * 2
    everything, _ = round_robin(prompts, assignments, torch.arange(100), 1000)
    assert everything.sort().values.tolist() == list(range(100))


def test_bins_cover_all_timesteps_and_draws_spread_over_them() -> None:
    edges, timesteps = timestep_bins(3, 1000, 8)
    assert edges.tolist() == [0, 333, 666, 1000]
    assert ((timesteps >= edges[:-1]) & (timesteps < edges[1:])).all()
    gaps = torch.cat([edges[:-1][None], timesteps, edges[1:][None]]).sort(0).values.diff(dim=0)
    assert gaps.max() < 2.1 * 333 / 8


def test_separation_is_in_standard_deviations_of_a_loss() -> None:
    # Losses 0 and 2 in one group, 4 and 6 in the other: each group's spread is 1. A third group
    # has no image.
    weights = torch.tensor([[0.5, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0.5, 0]])
    figures = bin_figures(torch.tensor([0.0, 2.0, 4.0, 6.0]), weights)
    assert figures["risks"] == [1.0, 5.0]
    assert figures["variance"] == 4.0
    assert figures["separation"] == 2.0
    assert figures["worst"] == figures["bound"] == 5.0


def _objective(name: str = "reweighting") -> HeldOutObjective:
    """Two cells of one prompt, of three and of two images; one bin drawn thrice as often."""
    cells = torch.tensor([0, 0, 0, 1, 1])
    weights = held_out_weights(torch.zeros(5, dtype=torch.int64), one_hot(cells, 2))
    shares = torch.tensor([0.25, 0.75], dtype=torch.float64)
    return HeldOutObjective(weights, cells, shares, build_rule(name, 2, 1.0))


LOSSES = torch.tensor([[1.0, 2], [2, 4], [3, 9], [5, 1], [7, 5]], dtype=torch.float64)


def test_the_objective_is_that_of_each_bin_averaged_as_it_is_drawn() -> None:
    # Risks (2, 6) and (5, 3): means 4 and 4, sample variances 8 and 2.
    assert _objective().value(LOSSES) == 4.0
    assert abs(_objective("variance").value(LOSSES) - (0.25 * 12 + 0.75 * 6)) < 1e-12


def test_the_standard_error_is_that_of_paired_differences_within_cells() -> None:
    other = LOSSES + torch.tensor([[0.0, 0], [0, 3], [0, 6], [8, 0], [0, 0]])
    # The mean of group means: each image counts half of its cell's mean.
    first = 0.75 * torch.tensor([0.0, 3, 6], dtype=torch.float64)
    second = 0.25 * torch.tensor([8.0, 0], dtype=torch.float64)
    expected = (first.var() / 3 + second.var() / 2).sqrt() / 2
    found = _objective().standard_error(other, LOSSES)
    assert abs(found - float(expected)) < 1e-12
    # What moves a whole cell alike is no noise.
    assert _objective().standard_error(LOSSES + 1, LOSSES) == 0.0
