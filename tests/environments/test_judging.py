"""What counts for an attribute, in data whose answer is known."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.environments.judging import compared, judge, search
from invdiff_pl.environments.shared_values import fit_values
from invdiff_pl.environments.space import Space, prompt_means, whiten


def _balanced(apart: float = 8.0, named: float = 0.0) -> tuple[Space, Tensor]:
    """Three prompts, half of whose images are in either place, and the place.

    Most of the third prompt's images on land look different by ``named``.
    """
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(1200) % 3
    place = torch.randint(2, (1200,), generator=source)
    features = torch.randn(1200, 8, generator=source) + 0.3 * prompts[:, None]
    features[:, 0] += apart * place
    some = torch.rand(1200, generator=source) < 0.7
    features[:, 1] += named * ((prompts == 2) & (place == 0) & some)
    space = whiten(features, prompts, 8)
    assert space is not None
    return space, place


@pytest.mark.parametrize(("named", "possible"), [(0.0, True), (12.0, False)])
def test_values_of_which_one_prompt_alone_shows_some_are_no_candidate(
    named: float, possible: bool
) -> None:
    space, _ = _balanced(named=named)
    many = next(each for each in search(space, 2, (8,), 0.3, 0) if each.sought == 8)
    assert many.possible == possible
    if possible:
        images = prompt_means(many.fit.memberships, space.prompts) * 400
        assert images.min() >= 1


def test_shares_differ_as_far_as_the_other_prompts_tell_too() -> None:
    space, place = _balanced()
    fit = fit_values(space, one_hot(place, 2).double())
    # The third prompt's place is mistaken: as if all its images were on land.
    mistaken = one_hot(torch.where(space.prompts == 2, 0, place), 2).double()
    shares = prompt_means(mistaken, space.prompts)
    wrong = replace(fit, memberships=mistaken, shares=shares)
    right, told = (
        compared(each, space, 0.01, 0) for each in judge([fit, wrong], 2, space, space.prompts, 0.5)
    )
    assert right.possible
    assert told.possible
    assert right.difference < 0.1
    assert told.difference < 0.1
    assert 2 * float(shares[:, 0].std(correction=0)) > 0.4


def test_alignment_of_unrelated_parts_is_called_chance() -> None:
    source = torch.Generator().manual_seed(1)
    prompts = torch.arange(1200) % 3
    place = torch.randint(2, (1200,), generator=source)
    features = torch.randn(1200, 8, generator=source)
    features[torch.arange(1200), prompts] += 8.0 * place
    space = whiten(features, prompts, 8)
    assert space is not None
    fit = fit_values(space, one_hot(place, 2).double())
    (judged,) = judge([fit], 2, space, space.prompts, 0.5)
    judged = compared(replace(judged, gain=1.0, shared=True), space, 0.01, 0)
    assert judged.p_alignment > 0.05
    # It stops as soon as that is known.
    assert (1 / judged.p_alignment) < 1999


@pytest.mark.parametrize("level", [0.01, 0.0003])
def test_an_aligned_attribute_reaches_any_level(level: float) -> None:
    space, place = _balanced()
    fit = fit_values(space, one_hot(place, 2).double())
    judged = compared(judge([fit], 2, space, space.prompts, 0.5)[0], space, level, 0)
    assert judged.is_aligned(level)
