"""Scores: which differences between images they keep and which they drop."""

import pytest
import torch

from invdiff_pl.environments import scores as scores_module
from invdiff_pl.environments.cuts import best_cut
from invdiff_pl.environments.figures import Direction
from invdiff_pl.environments.pursuit import HiddenAttribute
from invdiff_pl.environments.quality import auc
from invdiff_pl.environments.refine import CLEAR, RIDGE, Refined, discriminant
from invdiff_pl.environments.scores import (
    SCORES,
    Losses,
    attribute_scores,
    contrast_table,
    score,
    split_half_rank_correlation,
    standardise,
    timestep_weights,
)
from invdiff_pl.utils.errors import InvDiffError


def _table(count: int = 2000, seed: int = 0):
    """Two prompts; 5 % of each is conflicting, which shows at the last of four timesteps only."""
    source = torch.Generator().manual_seed(seed)
    prompts = torch.arange(count) % 2
    minority = torch.rand(count, generator=source) < 0.05
    losses = 1 + 0.1 * torch.randn(count, 4, 2, generator=source)
    losses[:, 0] *= 20  # a large scale must not drown the others
    losses[:, 3] += 0.6 * minority[:, None]
    losses[prompts == 1] += 3.0  # nor may the prompts' different levels
    return losses, prompts, minority


def test_standardised_losses_have_mean_zero_and_variance_one_in_every_cell() -> None:
    losses, prompts, _ = _table()
    table = standardise(losses, prompts)
    for prompt in (0, 1):
        cell = table[prompts == prompt]
        assert cell.mean(0).abs().max() < 1e-9
        torch.testing.assert_close(
            cell.var(0), torch.ones(4, 2, dtype=torch.float64), rtol=0.1, atol=0
        )


def test_three_images_of_a_prompt_are_not_divided_by_their_own_deviation() -> None:
    losses = torch.ones(103, 1, 1)
    losses[:100, 0, 0] = torch.linspace(0, 2, 100)
    losses[100:, 0, 0] = torch.tensor([1.0, 1.0, 1.0001])
    prompts = torch.tensor([0] * 100 + [1] * 3)
    assert standardise(losses, prompts)[100:].abs().max() < 0.1


def test_losses_that_do_not_vary_give_zero() -> None:
    assert (standardise(torch.ones(10, 2, 2), torch.zeros(10, dtype=torch.int64)) == 0).all()


def test_the_timestep_that_separates_gets_the_weight() -> None:
    losses, prompts, _ = _table()
    weights = timestep_weights(standardise(losses, prompts), prompts)
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights[3] > 0.95


def test_weights_are_even_where_nothing_separates() -> None:
    weights = timestep_weights(torch.zeros(10, 4, 2), torch.zeros(10, dtype=torch.int64))
    assert weights.tolist() == [0.25] * 4


def _nuisance(count: int, seed: int = 1) -> torch.Tensor:
    """What makes an image hard under any prompt, such as its texture."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 1, generator=source).expand(-1, 4, 2)


def test_each_refinement_ranks_the_minority_better() -> None:
    losses, prompts, minority = _table()
    nuisance = _nuisance(len(losses))
    null = 1 + nuisance + 0.01 * _nuisance(len(losses), seed=2)
    by_name = {
        name: auc(score(Losses(losses + nuisance, null), prompts, name), minority) or 0.0
        for name in SCORES
    }
    assert by_name["raw_mean"] < by_name["prompt_contrast"]
    assert by_name["standardised"] < by_name["prompt_contrast"]
    assert by_name["separation_weighted"] < by_name["weighted_contrast"]
    assert by_name["weighted_contrast"] > 0.99


def test_the_contrast_drops_what_is_hard_under_any_prompt() -> None:
    losses, prompts, _ = _table()
    nuisance = 5 * _nuisance(len(losses))
    plain = contrast_table(Losses(losses, torch.ones_like(losses)), prompts)
    shifted = contrast_table(Losses(losses + nuisance, 1 + nuisance), prompts)
    torch.testing.assert_close(shifted, plain, rtol=1e-3, atol=1e-3)


def test_the_smaller_group_points_up_whatever_the_losses_sign() -> None:
    losses, prompts, minority = _table()
    null = torch.ones_like(losses)
    turned = contrast_table(Losses(-losses, null), prompts)
    torch.testing.assert_close(turned[:, 3], contrast_table(Losses(losses, null), prompts)[:, 3])
    assert turned[minority, 3].mean() > 1
    assert turned[~minority, 3].mean() < 0


def test_refinement_cancels_noise_that_the_timesteps_share() -> None:
    losses, prompts, minority = _table()
    shared = 0.3 * torch.randn(len(losses), 1, generator=torch.Generator().manual_seed(5))
    losses[:, 1] += shared + 0.5 * minority[:, None]
    losses[:, 2] += shared
    both = Losses(losses, torch.ones_like(losses))
    plain, refined = (
        best_cut(score(both, prompts, name)).clarity
        for name in ("prompt_contrast", "refined_contrast")
    )
    assert refined > plain + 0.1
    assert auc(score(both, prompts, "refined_contrast"), minority) == 1.0


def test_refinement_keeps_the_scores_where_no_two_groups_show() -> None:
    source = torch.Generator().manual_seed(0)
    both = Losses(*torch.randn(2, 1000, 4, 2, generator=source).unbind(0))
    prompts = torch.arange(1000) % 2
    refined = score(both, prompts, "refined_contrast")
    # Noise alone must not be bent into two groups.
    clearest = max(best_cut(refined[prompts == prompt]).clarity for prompt in (0, 1))
    assert clearest < CLEAR


def test_the_discriminant_points_along_inverse_covariance_times_difference_of_means() -> None:
    source = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=torch.float64)
    upper = torch.arange(4000) < 2000
    table = torch.randn(4000, 2, generator=source, dtype=torch.float64) @ mixing.T
    table[upper] += torch.tensor([8.0, 0.0], dtype=torch.float64)
    prompts = torch.zeros(4000, dtype=torch.int64)
    found = discriminant(table, table[:, 0], prompts, upper.long())
    covariance = mixing @ mixing.T + RIDGE * torch.eye(2, dtype=torch.float64)
    direction = torch.linalg.inv(covariance) @ torch.tensor([1.0, 0.0], dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack([found, table @ direction]))[0, 1]
    assert correlation > 0.999
    assert found[upper].mean() > found[~upper].mean()


def test_a_prompt_with_few_images_keeps_its_scores() -> None:
    table = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()
    scores = table.mean(1)
    halves = torch.arange(8) % 2
    kept = discriminant(table, scores, torch.zeros(8, dtype=torch.int64), halves)
    assert torch.equal(kept, scores)


def test_scores_of_reproducible_losses_agree_between_halves() -> None:
    losses, prompts, _ = _table()

    def agreement(table: torch.Tensor) -> float | None:
        return split_half_rank_correlation(Losses(table, table), prompts, "standardised")

    noise = agreement(losses)
    assert agreement(losses[..., :1].expand(-1, -1, 2)) == pytest.approx(1.0)
    assert noise is not None
    assert noise < 0.5
    assert agreement(losses[..., :1]) is None


def test_an_unknown_score_is_refused_with_the_known_ones() -> None:
    losses, prompts, _ = _table(10)
    with pytest.raises(InvDiffError, match="separation_weighted"):
        score(Losses(losses, losses), prompts, "mean")


def test_groups_that_are_known_are_told_by_each_half_of_the_noises_as_if_pursued_again() -> None:
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(2000) % 2
    hidden = torch.rand(2000, generator=source) < torch.tensor([0.1, 0.9])[prompts]
    probes = torch.randn(2, 4, generator=source)
    losses = torch.randn(2000, 2, 4, generator=source) * 0.3 + 2 * probes * hidden[:, None, None]
    both = Losses(losses[..., :1], losses)
    _, refined = attribute_scores(both, prompts)
    told = split_half_rank_correlation(both, prompts, "prompt_pursuit", refined.scores)
    assert told == pytest.approx(
        split_half_rank_correlation(both, prompts, "prompt_pursuit"), abs=0.02
    )


@pytest.mark.parametrize(("evidence", "chosen"), [(1.1, 1), (1.9, 1), (2.5, 0)])
def test_of_rivals_the_one_that_refinement_finds_again_is_taken_unless_much_more_is_shown(
    evidence: float, chosen: int, monkeypatch
) -> None:
    losses, prompts, _ = _table(400)
    source = torch.Generator().manual_seed(0)
    signs = torch.where(torch.rand(2, 400, generator=source) < 0.5, -1.0, 1.0).double()
    flipped = torch.arange(400) % 8 // 2 == 2  # a quarter of either prompt: likeness a half
    elsewhere = torch.where(flipped, -signs[0], signs[0])
    ends = {evidence: elsewhere, 1.0: signs[1]}
    direction = Direction(torch.ones(1), 0.3, 0.2, 400.0, 0.5)
    rivals = [
        HiddenAttribute(scores, direction, 1.0, size)
        for scores, size in zip(signs, ends, strict=True)
    ]

    def refined(_table, scores, _prompts) -> Refined:
        for rival in rivals:
            if rival.scores is scores:
                return Refined(scores, ends[rival.evidence])
        return Refined(scores, scores)

    monkeypatch.setattr(scores_module, "hidden_attributes", lambda *_given, **_named: rivals)
    monkeypatch.setattr(scores_module, "refine", refined)
    found, _ = attribute_scores(Losses(losses, losses), prompts)
    assert found is rivals[chosen]
