"""Cutting in two: against all cuts, on normal values, and where a group is small."""

import numpy as np
import pytest
import torch

from invdiff_pl.environments.cuts import (
    LEAST_GAINED,
    TWO_MEANS,
    UNEVEN,
    CutRule,
    best_cut,
    cut_by_prompt,
    grouping,
    prompt_means,
    upper_groups,
)


def test_the_cut_lies_between_the_groups_and_tells_the_upper_share() -> None:
    cut = best_cut(torch.tensor([0.0, 0.2, 0.1, 5.0, 5.2]))
    assert 0.2 < cut.threshold.item() < 5.0
    assert cut.upper.item() == pytest.approx(0.4)
    assert cut.share.item() > 0.99


@pytest.mark.parametrize("rule", [TWO_MEANS, UNEVEN])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_leaves_less_unexplained(seed: int, rule: CutRule) -> None:
    source = np.random.default_rng(seed)
    values = np.concatenate([source.normal(size=40), source.normal(4.0, 0.5, size=seed * 8)])

    def unexplained(threshold: float) -> float:
        above = values > threshold
        within = np.where(above, values - values[above].mean(), values - values[~above].mean())
        entropy = -sum(p * np.log(p) for p in (above.mean(), 1 - above.mean()))
        return (within**2).mean() / values.var() * np.exp(2 * rule.entropy_weight * entropy)

    cut = best_cut(torch.from_numpy(values), rule.entropy_weight)
    least = min(unexplained(threshold) for threshold in np.sort(values)[:-1])
    assert unexplained(float(cut.threshold)) == pytest.approx(least)
    # What a cut through the middle of normal values leaves, whose half has variance 1 - 2 / pi.
    normal = (1 - 2 / np.pi) * 2 ** (2 * rule.entropy_weight)
    assert float(cut.clarity) == pytest.approx(1 - least / normal)


@pytest.mark.parametrize("rule", [TWO_MEANS, UNEVEN])
def test_normal_values_are_cut_in_the_middle_and_fall_into_no_groups(rule: CutRule) -> None:
    values = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))
    cut = best_cut(values, rule.entropy_weight)
    torch.testing.assert_close(cut.clarity, torch.zeros(3).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(cut.upper, torch.full((3,), 0.5).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(
        cut.share, torch.full((3,), 2 / torch.pi).double(), atol=0.01, rtol=0
    )


def test_a_few_images_far_off_are_cut_off_though_halving_the_others_explains_more() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    values[:4] += 9.0
    few = torch.arange(400) < 4
    one_prompt = torch.zeros(400, dtype=torch.int64)
    assert torch.equal(upper_groups(values, one_prompt), few)
    halved, _ = cut_by_prompt(values, one_prompt, TWO_MEANS)
    assert 0.3 < float(halved.double().mean()) < 0.7

    def explained(part: torch.Tensor) -> float:
        share = float(part.double().mean())
        return share * (1 - share) * float(values[part].mean() - values[~part].mean()) ** 2

    assert explained(values > values.median()) > explained(few)


def test_values_that_do_not_vary_and_single_ones_are_no_groups() -> None:
    for values in (torch.ones(5), torch.ones(1), torch.ones(0)):
        cut = best_cut(values)
        assert cut.clarity == 0
        assert cut.share == 0


def test_prompts_without_groups_hardly_count_beside_a_few_images_set_apart() -> None:
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(2000) % 2
    scores = torch.randn(2000, 1, generator=source)
    few = (prompts == 0) & (torch.arange(2000) < 40)
    scores[few] += 12.0
    told = grouping(scores, prompts)
    torch.testing.assert_close(prompt_means(told, prompts), torch.zeros(2, 1).double())
    clarity = float(best_cut(scores[prompts == 0]).clarity)
    assert float(told[few].mean()) == pytest.approx(-0.5 * np.log(1 - clarity) * 0.98, rel=1e-6)
    # The other prompt's halves, each about half from the mean, count less than a tenth of that.
    halves = float(told[prompts == 1].abs().max())
    assert 0.4 * LEAST_GAINED < halves < 0.1 * float(told[few].max())
    # By two-means they count alike.
    assert float(grouping(scores, prompts, TWO_MEANS)[prompts == 1].abs().mean()) > 0.45


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_prompt_of_a_few_images_counts_least_however_clear_its_groups(count: int) -> None:
    prompts = torch.tensor([0] * 400 + [1] * count)
    scores = torch.randn(len(prompts), 1, generator=torch.Generator().manual_seed(0))
    scores[:100] += 9.0
    told = grouping(scores, prompts).abs()
    assert float(told[prompts == 1].max()) <= LEAST_GAINED
    assert float(told[prompts == 0].min()) > 5 * LEAST_GAINED
