"""Reading environments off features, taking out the errors, and the scale that is even."""

import pytest
import torch
from torch import Tensor

from invdiff_pl.environments.reader import EnvironmentReader, even_scale, fit_reader


def _images(count: int, apart: float, minority: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features, prompts and environments; the second prompt's environments lie the other way."""
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(count) % 2
    assignments = (torch.rand(count, generator=source) < minority).long()
    features = torch.randn(count, 12, generator=source)
    features[:, 3] += 5.0 * prompts  # what a prompt names is no environment
    features[:, 7] += apart * assignments * torch.where(prompts == 0, 1.0, -1.0)
    return features, prompts, assignments


def test_environments_that_lie_oppositely_in_two_prompts_are_read() -> None:
    features, prompts, assignments = _images(2000, 5.0, 0.1)
    reader = fit_reader(features[:1000], prompts[:1000], assignments[:1000], 2)
    read = reader.read(features[1000:], prompts[1000:])
    assert (read == assignments[1000:]).double().mean() > 0.98
    # What it tells of itself holds for images it has not learned from.
    for environment in (0, 1):
        found = float((read == environment)[assignments[1000:] == environment].double().mean())
        assert float(reader.confusion[environment, environment]) == pytest.approx(found, abs=0.05)


def test_environments_that_features_do_not_show_are_told_as_such() -> None:
    features, prompts, assignments = _images(2000, 0.0, 0.3)
    assert fit_reader(features, prompts, assignments, 2).recall < 0.6


def test_an_environment_that_a_prompt_lacks_is_never_read_in_it() -> None:
    features, prompts, assignments = _images(1000, 5.0, 0.3)
    assignments[prompts == 1] = 0
    reader = fit_reader(features, prompts, assignments, 2)
    assert set(reader.read(features, prompts)[prompts == 1].tolist()) == {0}


def test_the_readers_errors_are_taken_out_of_shares() -> None:
    confusion = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    reader = EnvironmentReader(torch.zeros(1, 1), torch.zeros(2, 2, 1), confusion)
    # Of 500 + 500 images 450 + 100 are read as the first; of 1000 + 0 900.
    shares = reader.shares(torch.tensor([[550, 450], [900, 100]]))
    expected = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([0.4, 0.6], 1.25),  # half way between 0.6 and 0.4
        ([0.55, 0.45], 1.5),  # not even yet
        ([0.7, 0.3], 1.0),  # ever less even
        ([0.2, 0.8], 1.125),  # a quarter of the way
    ],
)
def test_the_even_scale_lies_where_straight_lines_cross_an_even_share(second, expected) -> None:
    shares = torch.tensor([[[0.6, 0.4]], [second]])
    assert even_scale(torch.tensor([1.0, 1.5]), shares) == pytest.approx(expected)


def test_prompts_that_disagree_share_the_scale_of_least_squares() -> None:
    # Distances to one half, over the prompts: (0.1 - 0.2 x)^2 + (0.1 - 0.1 x)^2, least at x = 0.6.
    shares = torch.tensor([[[0.6, 0.4], [0.6, 0.4]], [[0.4, 0.6], [0.5, 0.5]]])
    assert even_scale(torch.tensor([1.0, 2.0]), shares) == pytest.approx(1.6)
