"""Shares that each part of the images is read to have with what the others show."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.environments.cross_reading import cross_read_shares
from invdiff_pl.environments.space import Space, prompt_means, whiten

SHARES = torch.tensor([0.2, 0.5, 0.8])


def _space() -> tuple[Space, Tensor]:
    """Of three prompts whose images have a value in other shares, and the value."""
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(1200) % 3
    value = (torch.rand(1200, generator=source) < SHARES[prompts]).long()
    features = torch.randn(1200, 4, generator=source).double() + 5 * prompts[:, None]
    features = features + 5 * value[:, None] * torch.tensor([1.0, 0, -1, 0])
    space = whiten(features, prompts, 4)
    assert space is not None
    return space, value


def _true(space: Space, value: Tensor) -> Tensor:
    return prompt_means(one_hot(value, 2).double(), space.prompts)


def test_shares_of_a_shared_attribute_are_read_as_they_are() -> None:
    space, value = _space()
    read = cross_read_shares(space, one_hot(value, 2).double(), space.prompts)
    torch.testing.assert_close(read, _true(space, value), atol=0.03, rtol=0)


def test_a_prompt_that_is_mistaken_for_one_of_one_value_is_read_as_it_is() -> None:
    space, value = _space()
    mistaken = torch.where(space.prompts == 1, 0, value)
    read = cross_read_shares(space, one_hot(mistaken, 2).double(), space.prompts)
    torch.testing.assert_close(read[1], _true(space, value)[1], atol=0.04, rtol=0)


def test_shares_are_the_mean_of_what_images_have_by_the_regression_of_the_others() -> None:
    space, value = _space()
    members = one_hot(value, 2).double()
    read = cross_read_shares(space, members, space.prompts)
    there = space.prompts != 0
    # With certain values the maximisation step is least squares on value and prompt.
    design = torch.cat([value[there, None].double(), one_hot(space.prompts[there], 3)[:, 1:]], 1)
    solved = torch.linalg.lstsq(design, space.values[there]).solution
    noise = space.values[there] - design @ solved
    precision = torch.linalg.inv(noise.T @ noise / len(noise))
    delta, share = solved[0], read[0, 1]
    line = (space.values[~there] + share * delta - delta / 2) @ precision @ delta
    expected = torch.sigmoid(line + torch.logit(share)).mean()
    torch.testing.assert_close(share, expected, atol=1e-3, rtol=0)


def test_prompts_of_a_part_are_read_together_with_shares_of_their_own() -> None:
    space, value = _space()
    parts = (space.prompts > 0).long()
    read = cross_read_shares(space, one_hot(value, 2).double(), parts)
    torch.testing.assert_close(read, _true(space, value), atol=0.04, rtol=0)
