"""Reading environments off features, taking out the errors, and the scale that is even."""

import pytest
import torch
from torch import Tensor

from invdiff_pl.environments.reader import Counts, EnvironmentReader, even_scale, fit_reader


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
    for read, expected in (((550, 450), (0.5, 0.5)), ((900, 100), (1.0, 0.0))):
        environments = torch.arange(2).repeat_interleave(torch.tensor(read))
        shares = reader.corrected(environments).mean(0)
        torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float64))


def test_too_few_images_to_learn_from_are_told() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit_reader(torch.randn(5, 3), torch.zeros(5).long(), torch.arange(5) % 2, 2)


def _exact(*shares: list[list[float]]) -> dict[float, Counts]:
    """Counts without noise at scales 1, 1.5 and so on: every pair shows the prompt's shares."""
    return {
        1 + 0.5 * n: Counts(torch.tensor(told, dtype=torch.float64)[:, None].repeat(1, 4, 1))
        for n, told in enumerate(shares)
    }


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([0.4, 0.6], 1.25),  # half way between 0.6 and 0.4
        ([0.55, 0.45], 1.5),  # not even yet
        ([0.7, 0.3], 1.0),  # ever less even
        ([0.2, 0.8], 1.125),  # a quarter of the way
        ([0.6, 0.4], None),  # nothing changes
    ],
)
def test_the_even_scale_lies_where_straight_lines_cross_an_even_share(second, expected) -> None:
    assert even_scale(_exact([[0.6, 0.4]], [second])) == pytest.approx(expected)


def test_prompts_that_disagree_share_the_scale_of_least_squares() -> None:
    # Distances to one half, over the prompts: (0.1 - 0.2 x)^2 + (0.1 - 0.1 x)^2, least at x = 0.6.
    counts = _exact([[0.6, 0.4], [0.6, 0.4]], [[0.4, 0.6], [0.5, 0.5]])
    assert even_scale(counts) == pytest.approx(1.3)


@pytest.mark.parametrize("even_at", [1.1, 1.25, 1.4])
def test_counting_few_samples_does_not_draw_the_scale_to_the_middle(even_at: float) -> None:
    source = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        counts = {}
        noise = torch.rand(6, 43, 2, generator=source, dtype=torch.float64)
        for scale in (1.0, 1.5):
            # Shared noise: a sample that is of the second environment stays so as its share grows.
            second = (noise < 0.5 + 0.4 * (scale - even_at)).double()
            counts[scale] = Counts(torch.stack([1 - second, second], dim=3).mean(2))
        found.append(even_scale(counts))
    told = torch.tensor([scale for scale in found if scale is not None])
    assert len(told) > 190
    assert float(told.mean()) == pytest.approx(even_at, abs=0.02)


def test_shares_that_only_noise_moves_give_no_scale() -> None:
    source = torch.Generator().manual_seed(1)
    found = []
    for _ in range(100):
        second = (torch.rand(2, 6, 43, 2, generator=source) < 0.5).double()
        pairs = torch.stack([1 - second, second], dim=4).mean(3)
        found.append(even_scale({1.0: Counts(pairs[0]), 1.5: Counts(pairs[1])}))
    assert sum(scale is None for scale in found) > 90
