"""Two values along lines, against closed forms and the fit in all components."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from invdiff_pl.environments.lines import Lines
from invdiff_pl.environments.shared_values import Fit, fit_values, log_likelihood_ratio
from invdiff_pl.environments.space import Space, whiten


def _clear(apart: float, frequent: float = 0.9) -> tuple[Space, Fit]:
    """A prompt of 900 images and one of 100, in which two values have unlike shares."""
    prompts = torch.tensor([0] * 900 + [1] * 100)
    value = (torch.arange(900) >= round(900 * frequent)).long()
    value = torch.cat([value, (torch.arange(100) >= 20).long()])
    features = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    space = whiten(features.double() + apart * value[:, None], prompts, 1)
    assert space is not None
    return space, fit_values(space, one_hot(value, 2).double())


def test_the_ratio_of_clear_values_is_what_they_tell_of_prompts_of_any_size() -> None:
    space, fit = _clear(40.0)

    def nats(*shares: float) -> float:
        return -sum(share * math.log(share) for share in shares)

    told = nats(0.83, 0.17) - 0.9 * nats(0.9, 0.1) - 0.1 * nats(0.2, 0.8)
    for ratio in (log_likelihood_ratio(fit, space), float(Lines.of([fit], space).ratios())):
        assert ratio == pytest.approx(2000 * told, rel=0.01)


@pytest.mark.parametrize("frequent", [0.9, 0.5])
def test_clear_values_gain_by_their_distance_less_what_naming_them_takes(frequent: float) -> None:
    space, fit = _clear(20.0, frequent)
    (gain,) = Lines.of([fit], space).gains(space.prompts)[0].tolist()
    image = space.values[space.prompts == 0, 0]
    low = image < (image.min() + image.max()) / 2
    low = low if int(low.sum()) >= 450 else ~low
    within = torch.cat([image[low] - image[low].mean(), image[~low] - image[~low].mean()])
    entropy = -(frequent * math.log(frequent) + (1 - frequent) * math.log(1 - frequent))
    widths = float(image.square().mean() / within.square().mean())
    assert gain == pytest.approx(0.5 * math.log(widths) - entropy - 1 / 900, rel=0.01)


def test_ratios_along_lines_are_those_of_all_components_one_by_one_or_together() -> None:
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(1200) % 3
    value = torch.rand(1200, generator=source) < torch.tensor([0.2, 0.5, 0.8])[prompts]
    features = torch.randn(1200, 4, generator=source) + 3 * value[:, None]
    space = whiten(features, prompts, 4)
    assert space is not None
    noisy = value ^ (torch.rand(1200, generator=source) < 0.3)
    starts = [one_hot(each.long(), 2) for each in (value, noisy)]
    fits = [fit_values(space, start, rounds) for start in starts for rounds in (1, 60)]
    together = Lines.of(fits, space).ratios()
    alone = torch.cat([Lines.of([fit], space).ratios() for fit in fits])
    torch.testing.assert_close(together, alone)
    components = [log_likelihood_ratio(fit, space) for fit in fits]
    torch.testing.assert_close(together, torch.tensor(components).double(), rtol=1e-3, atol=0.1)
    assert float(together.min()) < 0.9 * float(together.max())
