"""The pursuit of a hidden attribute: found where prompts differ in its shares, not elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from invdiff_pl.environments import pursuit
from invdiff_pl.environments.cuts import UNEVEN, best_cut, prompt_means
from invdiff_pl.environments.directions import _log_share, skew_spread, suggested
from invdiff_pl.environments.evidence import group_likeness, share_spread, weigh
from invdiff_pl.environments.figures import MEASURED, likeliest
from invdiff_pl.environments.pursuit import LEAST_RIVAL, HiddenAttribute, hidden_attributes
from invdiff_pl.environments.refine import Refined


def _readings(shares: list[float], count: int = 1000, width: int = 10, seed: int = 0):
    """Mixed readings of a hidden attribute, of what the prompt names and of four nuisances.

    The first nuisance falls into two groups too, alike in both prompts.
    """
    source = torch.Generator().manual_seed(seed)
    prompts = torch.arange(count) % len(shares)
    hidden = torch.rand(count, generator=source) < torch.tensor(shares)[prompts]
    nuisances = torch.randn(count, 4, generator=source)
    nuisances[:, 0] = 2.0 * (torch.rand(count, generator=source) < 0.5) - 1
    named = prompts[:, None] + 0.2 * torch.randn(count, 1, generator=source)
    causes = torch.cat([2.0 * hidden[:, None], 5 * named, nuisances], dim=1)
    mixing = torch.randn(causes.shape[1], width, generator=source)
    noise = 0.3 * torch.randn(count, width, generator=source)
    return causes @ mixing + noise, prompts, hidden


def _kept(scores: torch.Tensor) -> Refined:
    """Scores whose refinement ends where it began."""
    return Refined(scores, scores)


def _agreement(scores: torch.Tensor, prompts: torch.Tensor, hidden: torch.Tensor) -> float:
    """Correlation with the attribute, within prompts."""
    residual = hidden.double()
    for prompt in prompts.unique().tolist():
        residual[prompts == prompt] -= residual[prompts == prompt].mean()
    return float(torch.corrcoef(torch.stack([scores, residual]))[0, 1].abs())


def _found(
    table: torch.Tensor, prompts: torch.Tensor, suggestions: torch.Tensor | None = None
) -> HiddenAttribute | None:
    """What has most evidence, if there is anything to compare."""
    told = hidden_attributes(table, prompts, suggestions=suggestions)
    return told[0] if told else None


@pytest.mark.parametrize("shares", [[0.05, 0.95], [0.3, 0.7], [0.1, 0.5]])
def test_an_attribute_that_goes_along_with_prompts_is_found(shares: list[float]) -> None:
    table, prompts, hidden = _readings(shares)
    found = _found(table, prompts)
    assert found is not None
    assert _agreement(found.scores, prompts, hidden) > 0.9
    assert weigh(found, _kept(found.scores), prompts).bias_found


@pytest.mark.parametrize("seed", range(2))
def test_an_attribute_that_all_prompts_share_alike_is_no_bias(seed: int) -> None:
    table, prompts, _ = _readings([0.5, 0.5], seed=seed)
    found = _found(table, prompts)
    assert found is not None
    assert weigh(found, _kept(found.scores), prompts).bias_found is False


def test_one_prompt_or_too_few_images_cannot_be_tested() -> None:
    table, prompts, _ = _readings([0.3, 0.7])
    for found in (
        _found(table, torch.zeros_like(prompts)),
        _found(table[:20], prompts[:20]),
    ):
        assert found is None
    assert weigh(None, _kept(table[:, 0]), prompts).bias_found is None


def test_the_spread_of_shares_is_their_difference_between_two_prompts_of_equal_size() -> None:
    scores = torch.tensor([0.0, 0, 0, 1, 0, 1, 1, 1])
    prompts = torch.tensor([0] * 4 + [1] * 4)
    assert share_spread(scores, prompts) == pytest.approx(0.5)


def test_shares_of_a_second_attribute_are_compared_at_the_same_value_of_the_first() -> None:
    # Sizes and shares by (prompt, value): each prompt has its own value in nine of ten images.
    sizes = [[900, 100], [100, 900]]

    def drawn(shares: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = []
        for prompt in (0, 1):
            for value in (0, 1):
                count = sizes[prompt][value]
                upper = (torch.arange(count) < shares[prompt][value] * count).double()
                labels = torch.tensor([[prompt, value]]).expand(count, 2)
                parts.append(torch.cat([upper[:, None], labels], dim=1))
        scores, prompts, values = torch.cat(parts).unbind(1)
        return scores, prompts.long(), values.long()

    # What only goes along with the first attribute, as the kind of water with water, is no bias...
    scores, prompts, values = drawn([[0.1, 0.5], [0.1, 0.5]])
    assert share_spread(scores, prompts, values) == pytest.approx(0.0, abs=1e-6)
    assert share_spread(scores, prompts) == pytest.approx(0.32)
    # ... nor can prompts be compared that share no value...
    prompts = torch.arange(400) % 2
    scores = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.3 + 0.4 * prompts
    assert share_spread(scores.double(), prompts, values=prompts) == 0.0
    # ... and what goes along with the prompts, whatever the first attribute, is.
    scores, prompts, values = drawn([[0.2, 0.2], [0.8, 0.8]])
    assert share_spread(scores, prompts, values) == pytest.approx(0.6)


def test_the_order_of_readings_and_shifts_of_a_prompt_do_not_matter() -> None:
    table, prompts, _ = _readings([0.2, 0.8])
    first = _found(table, prompts)
    moved = table.flip(1) + 100.0 * prompts[:, None]
    second = _found(moved, prompts)
    assert first is not None
    assert second is not None
    pair = torch.stack([first.scores, second.scores])
    assert torch.corrcoef(pair)[0, 1].abs() > 0.98


def test_skewness_spreads_only_where_shapes_differ() -> None:
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(4000) % 2
    alike = torch.randn(4000, generator=source)
    mirrored = torch.randn(4000, generator=source).exp()
    mirrored = torch.where(prompts == 0, mirrored, -mirrored)
    scores = torch.stack([alike, mirrored], dim=1).double()
    for prompt in (0, 1):
        scores[prompts == prompt] -= scores[prompts == prompt].mean(0)
    spread = skew_spread(scores, prompts)
    assert spread[0] < 0.02
    assert spread[1] > 0.1


def test_the_share_explained_climbs_by_its_numerical_derivative() -> None:
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(600) % 3
    readings = torch.randn(600, 4, generator=source, dtype=torch.float64)
    readings += 2.0 * (torch.rand(600, 1, generator=source) < 0.3)
    readings -= prompt_means(readings, prompts)[prompts]

    def log_share(direction: torch.Tensor) -> torch.Tensor:
        shares = [best_cut(readings[prompts == p] @ direction).share.log() for p in range(3)]
        return torch.stack(shares).mean()

    direction = torch.randn(4, generator=source, dtype=torch.float64, requires_grad=True)
    climbed = _log_share((readings @ direction)[:, None], prompts, UNEVEN)
    torch.testing.assert_close(climbed[0].detach(), log_share(direction.detach()))
    climbed.sum().backward()
    step = 1e-6 * torch.eye(4, dtype=torch.float64)
    fixed = direction.detach()
    numerical = [float(log_share(fixed + d) - log_share(fixed - d)) / 2e-6 for d in step]
    torch.testing.assert_close(
        direction.grad, torch.tensor(numerical).double(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_few_images_against_a_bias_of_99_percent_are_found_where_another_score_hints_at_them(
    seed: int,
) -> None:
    source = torch.Generator().manual_seed(seed)
    count = 2400
    prompts = torch.arange(count) % 2
    hidden = torch.rand(count, generator=source) < torch.tensor([0.01, 0.99])[prompts]
    other = torch.rand(count, 3, generator=source) < 0.5  # two groups each, alike in both prompts
    causes = torch.cat([6.0 * hidden[:, None], 2.0 * other], dim=1)
    table = causes @ torch.randn(4, 10, generator=source)
    table += 0.5 * torch.randn(count, 10, generator=source)
    against = (hidden != prompts.bool()).float()
    hint = 5 * against + torch.randn(count, generator=source)
    still = torch.zeros(count)  # a suggestion that does not vary says nothing
    found = _found(table, prompts, suggestions=torch.stack([hint, still], dim=1))
    assert found is not None
    assert _agreement(found.scores, prompts, hidden) > 0.9
    assert found.agreement > 0.9
    told = weigh(found, _kept(found.scores), prompts)
    assert told.bias_found
    assert told.share_spread == pytest.approx(0.98, abs=0.02)


def test_rivals_are_told_apart_by_evidence_of_much_the_same_size() -> None:
    # Two attributes that go along with the prompts, the second as clearly as the first.
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(4000) % 2
    shown = torch.rand(4000, 2, generator=source) < torch.tensor([0.3, 0.7])[prompts][:, None]
    causes = torch.cat([4.0 * shown, torch.randn(4000, 4, generator=source)], dim=1)
    table = causes @ torch.randn(6, 10, generator=source)
    table += 0.3 * torch.randn(4000, 10, generator=source)
    first, second = hidden_attributes(table, prompts)[:2]
    assert first.evidence >= second.evidence >= LEAST_RIVAL * first.evidence
    likeness = torch.corrcoef(torch.stack([first.scores, second.scores]))[0, 1]
    assert likeness.abs() < 0.9
    both = [
        max(_agreement(found.scores, prompts, shown[:, k]) for found in (first, second))
        for k in (0, 1)
    ]
    assert min(both) > 0.9


def test_sharpening_that_loses_the_groups_is_not_followed(monkeypatch) -> None:
    table, prompts, hidden = _readings([0.3, 0.7])
    source = torch.Generator().manual_seed(0)
    lost: list[torch.Tensor] = []

    def to_random(_readings, directions, *_given, **_named) -> torch.Tensor:
        lost.append(torch.randn(directions.shape, generator=source, dtype=torch.float64))
        return lost[-1]

    monkeypatch.setattr(pursuit, "sharpen", to_random)
    found = _found(table, prompts)
    assert found is not None
    assert lost
    assert _agreement(found.scores, prompts, hidden) > 0.85


def test_groups_of_any_sign_in_a_prompt_suggest_their_common_direction() -> None:
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(1500) % 3
    hidden = torch.rand(1500, generator=source) < torch.tensor([0.1, 0.9, 0.5])[prompts]
    readings = torch.randn(1500, 8, generator=source, dtype=torch.float64)
    readings[:, 2] = 4.0 * hidden + 0.5 * readings[:, 2]
    readings -= prompt_means(readings, prompts)[prompts]
    signs = torch.tensor([1.0, -1.0, -1.0])[prompts]
    scores = signs * hidden + 0.1 * torch.randn(1500, generator=source)
    found = suggested(readings, prompts, scores[:, None])[:, 0]
    assert found.abs().argmax() == 2
    assert found[2].abs() > 0.99 * found.norm()


def test_evidence_that_is_no_number_is_no_bias() -> None:
    table, prompts, _ = _readings([0.3, 0.7])
    found = _found(table, prompts)
    assert found is not None
    assert weigh(found, _kept(found.scores), prompts).bias_found
    unknown = replace(found, agreement=float("nan"))
    assert weigh(unknown, _kept(found.scores), prompts).bias_found is False


def test_the_direction_of_the_groups_is_among_the_likeliest_of_many() -> None:
    table, prompts, hidden = _readings([0.3, 0.7], width=30)
    centred = (table - prompt_means(table, prompts)[prompts]).double()
    groups = hidden.double() - prompt_means(hidden.double(), prompts)[prompts]
    right = torch.linalg.lstsq(centred, groups[:, None]).solution
    source = torch.Generator().manual_seed(1)
    others = torch.randn(30, 2 * MEASURED, generator=source, dtype=torch.float64)
    ahead = likeliest(centred, prompts, torch.cat([others, right], dim=1))
    assert len(ahead) == MEASURED
    assert ahead[0] == 2 * MEASURED


@pytest.mark.parametrize("seed", range(3))
def test_a_minority_in_all_prompts_is_found_beside_clearer_attributes_of_one_prompt_each(
    seed: int,
) -> None:
    source = torch.Generator().manual_seed(seed)
    count = 4000
    prompts = torch.arange(count) % 2
    hidden = torch.rand(count, generator=source) < torch.tensor([0.14, 0.86])[prompts]
    beard = (torch.rand(count, generator=source) < 0.3) & (prompts == 0)
    fringe = (torch.rand(count, generator=source) < 0.3) & (prompts == 1)
    nuisances = torch.randn(count, 6, generator=source)
    causes = torch.stack([2.0 * hidden, 4.0 * beard, 4.0 * fringe], dim=1)
    mixing = torch.randn(9, 16, generator=source)
    readings = torch.cat([causes, nuisances], dim=1) @ mixing
    readings += 0.8 * torch.randn(count, 16, generator=source)
    found = _found(readings, prompts)
    assert found is not None
    assert _agreement(found.scores, prompts, hidden) > 0.85
    assert weigh(found, _kept(found.scores), prompts).bias_found


def test_likeness_is_the_phi_coefficient_of_the_groups_in_the_less_alike_prompts() -> None:
    prompts = torch.arange(400) % 2
    first = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.4
    swapped = torch.arange(400) < 60
    second = torch.where((prompts == 1) & swapped, ~first, first)
    expected = np.corrcoef(first[prompts == 1], second[prompts == 1])[0, 1]
    assert group_likeness(first.double(), second.double(), prompts) == pytest.approx(expected)
    assert group_likeness(first.double(), first.double(), prompts) == pytest.approx(1.0)
    assert group_likeness(first.double(), torch.zeros(400), prompts) == 0.0


def test_groups_neither_aligned_nor_those_that_each_prompt_shows_most_clearly_are_no_bias() -> None:
    table, prompts, _ = _readings([0.3, 0.7])
    found = _found(table, prompts)
    assert found is not None
    figures = replace(found.held_out, alignment=0.1, clarity=0.3, gain=0.25)
    apart = replace(found, held_out=figures)
    assert weigh(apart, _kept(found.scores), prompts).bias_found
    elsewhere = Refined(found.scores, torch.where(prompts == 0, table[:, -1], found.scores))
    assert weigh(found, elsewhere, prompts).bias_found
    told = weigh(apart, elsewhere, prompts)
    assert told.bias_found is False
    assert told.reason == "it is not the same in all prompts"
