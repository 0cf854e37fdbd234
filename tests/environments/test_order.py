"""Which hidden attribute comes first."""

from dataclasses import replace

import pytest
import torch

from invdiff_pl.environments.hidden_attribute import (
    HiddenAttributeSettings,
    find_hidden_attributes,
    ranked,
)
from invdiff_pl.environments.judging import Judged, each_level
from invdiff_pl.environments.shared_values import Fit

SETTINGS = HiddenAttributeSettings()
LEVEL = 0.01


def _judged(
    values: int, gain: float, ratio: float, axis: int = 0, p_alignment: float = 0.001
) -> Judged:
    """Of three prompts and four images, in half of each prompt's images a value of its own."""
    shares = torch.eye(3, values).double() / 2 + 0.5 / values
    fit = Fit(
        memberships=torch.full((4, values), 1 / values).double(),
        shares=shares / shares.sum(1, keepdim=True),
        places=torch.zeros(3, 8).double(),
        delta=torch.arange(values).double()[:, None] * torch.eye(8)[axis],
        precision=torch.eye(8).double(),
        log_likelihood=torch.zeros(4).double(),
    )
    told = {"alignment": 0.9, "p_alignment": p_alignment, "difference": 0.5}
    return Judged(fit, gain, True, values, ratio, ratio / 8, **told)


@pytest.mark.parametrize(
    ("two", "many", "first"),
    [
        # Strengths: a place 39.7, cuts of birds 14.7; parts of a place 4.4, its scenes 14.8.
        ((1.40, 387), (8, 0.89, 1184), 2),
        ((0.27, 127), (32, 2.11, 588), 32),
    ],
)
def test_values_come_first_that_gain_more_for_each_nat_that_naming_them_takes(
    two: tuple[float, float], many: tuple[int, float, float], first: int
) -> None:
    found = [_judged(2, *two), _judged(*many)]
    assert ranked(found, LEVEL, SETTINGS)[0].values == first


def test_what_chance_explains_is_not_strong() -> None:
    # Of a thousand prompts and 32 values chance alone makes a ratio of some 31000.
    chance = replace(_judged(32, gain=5.0, ratio=31000), evidence=0.0)
    two = _judged(2, gain=0.1, ratio=50)
    assert ranked([chance, two], LEVEL, SETTINGS) == [two, chance]


def test_the_stronger_of_two_values_comes_first_and_what_is_not_aligned_after_it() -> None:
    weak, strong, apart = (
        _judged(2, gain=0.3, ratio=150),
        _judged(2, gain=0.5, ratio=100, axis=1),
        _judged(2, gain=5.0, ratio=900, axis=2, p_alignment=0.5),
    )
    assert ranked([apart, weak, strong], LEVEL, SETTINGS) == [strong, weak, apart]


def test_of_two_readings_of_a_direction_that_which_others_confirm_is_taken() -> None:
    mistaken, right = _judged(2, gain=0.01, ratio=8), _judged(2, gain=0.3, ratio=4)
    mistaken = replace(mistaken, difference=0.0)
    assert ranked([mistaken, right], LEVEL, SETTINGS) == [right]


def test_of_many_values_only_the_strongest_is_a_candidate() -> None:
    found = [_judged(values, gain=1.0, ratio=100.0 * values) for values in (4, 8, 16)]
    assert [each.values for each in ranked(found, LEVEL, SETTINGS)] == [16]


def test_the_level_of_each_is_shared_out_among_all_that_might_be_an_attribute() -> None:
    found = [_judged(2, 0.3, 50), _judged(2, 0.5, 9, axis=1), _judged(2, gain=-0.1, ratio=0)]
    assert each_level(found, 0.05) == 0.025
    assert each_level([], 0.05) == 0.05


@pytest.mark.parametrize("uneven", [True, False])
def test_what_other_prompts_do_not_confirm_comes_after_what_they_do(uneven: bool) -> None:
    strong, weak = _judged(2, gain=2.0, ratio=900), _judged(2, gain=0.3, ratio=50, axis=1)
    strong = replace(strong, difference=0.5 if uneven else 0.0)
    assert ranked([strong, weak], LEVEL, SETTINGS)[0] == (strong if uneven else weak)


@pytest.mark.parametrize(("images", "numbers"), [(6, {2}), (60, {2, 4})])
def test_many_values_are_looked_for_where_prompts_have_many_images(
    images: int, numbers: set[int]
) -> None:
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(600) // images
    usual = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])[prompts % 2]
    scene = torch.multinomial(usual, 1, generator=source).squeeze(1)
    features = torch.randn(600, 8, generator=source) + 9 * torch.eye(4, 8)[scene]
    quick = replace(SETTINGS, starts=4, components=8, values=(4,), alpha=0.5, resamples=1)
    found = find_hidden_attributes(features, prompts, quick)
    assert {each.memberships.shape[1] for each in found} == numbers
