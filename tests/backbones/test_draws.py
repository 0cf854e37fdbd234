"""Counter-based randomness and timesteps."""

import pytest
import torch

from invdiff_pl.backbones.draws import (
    generator,
    logit_normal_timesteps,
    sample_timesteps,
    stratified_timesteps,
)


def test_the_same_counters_give_the_same_numbers_and_others_do_not() -> None:
    def draw(*key) -> list[float]:
        return torch.randn(4, generator=generator(*key)).tolist()

    assert draw(0, "a", 1, 2) == draw(0, "a", 1, 2)
    others = [(1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 1), (0, "a", 12), (0, "a", 1)]
    assert all(draw(*other) != draw(0, "a", 1, 2) for other in others)


def test_stratified_timesteps_are_the_middles_of_equal_parts_of_the_range() -> None:
    assert stratified_timesteps(4, 1000).tolist() == [125, 375, 625, 875]
    assert stratified_timesteps(4, 1000, 0.72, 0.96).tolist() == [750, 810, 870, 930]
    assert stratified_timesteps(1, 1000, 0.5).tolist() == [750]
    assert stratified_timesteps(3000, 1000).max() == 999


@pytest.mark.parametrize("exponent", [1.0, 1 / 3])
def test_timesteps_follow_the_density(exponent: float) -> None:
    drawn = sample_timesteps(20000, 1000, exponent, generator(0, "t")).double()
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    # T u^a has mean T / (1 + a), and falls below T/2 with probability (1/2)^(1/a).
    assert drawn.mean().item() == pytest.approx(1000 / (1 + exponent), rel=0.01)
    assert (drawn < 500).double().mean().item() == pytest.approx(0.5 ** (1 / exponent), abs=0.01)


def test_half_of_logit_normal_times_lie_where_signal_and_noise_are_about_even() -> None:
    drawn = logit_normal_timesteps(20000, 1000, generator(0, "t")).double() / 1000
    # The logistic function of a standard normal: quartiles at -0.6745 and 0.6745.
    inside = (drawn > 0.3375) & (drawn < 0.6625)
    assert inside.double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(drawn, drawn.sort().values)


def test_every_stratum_of_the_density_is_drawn_once() -> None:
    drawn = sample_timesteps(10, 1000, 1.0, generator(3, "t"))
    assert sorted((drawn // 100).tolist()) == list(range(10))
