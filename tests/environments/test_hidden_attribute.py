"""Hidden attributes in data whose answer is known, and in data where there is none."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from invdiff_pl.environments import hidden_attribute
from invdiff_pl.environments.hidden_attribute import (
    HiddenAttributeSettings,
    find_hidden_attributes,
)
from invdiff_pl.environments.judging import Judged, judge, parts_of
from invdiff_pl.environments.shared_values import fit_values
from invdiff_pl.environments.space import Space
from invdiff_pl.utils.errors import InvDiffError

QUICK = HiddenAttributeSettings(starts=12, values=(), components=8, alpha=0.2, resamples=4)


def _images(
    count: int, shares: list[float], apart: float = 6.0, seed: int = 0, directions: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, prompts and a hidden attribute; of several directions, each prompt has its own."""
    source = torch.Generator().manual_seed(seed)
    prompts = torch.arange(count) % len(shares)
    attribute = (torch.rand(count, generator=source) < torch.tensor(shares)[prompts]).long()
    features = torch.randn(count, 8, generator=source)
    features[:, 0] += 9.0 * prompts  # what is named
    features[torch.arange(count), 1 + prompts % directions] += apart * attribute
    return features, prompts, attribute


def _agreement(memberships: Tensor, attribute: Tensor) -> float:
    right = float((memberships.argmax(1) == attribute).double().mean())
    return max(right, 1 - right)


@pytest.mark.parametrize("shares", [[0.1, 0.9], [0.3, 0.7], [0.02, 0.98], [0.05, 0.5, 0.9]])
def test_an_attribute_that_goes_along_with_prompts_is_found(shares: list[float]) -> None:
    features, prompts, attribute = _images(600, shares)
    found = find_hidden_attributes(features, prompts, QUICK)[0]
    assert found.verdict == "bias"
    assert found.p_value <= 0.2
    assert _agreement(found.memberships, attribute) > 0.98
    assert found.alignment > 0.9
    true = torch.tensor([attribute[prompts == p].double().mean() for p in range(len(shares))])
    column = int(found.memberships[:, 1].round().long().eq(attribute).double().mean() > 0.5)
    assert found.shares[:, column].sub(true).abs().max() < 0.03
    torch.testing.assert_close(found.memberships.sum(1), torch.ones(600).double())


def test_conflict_is_higher_of_every_image_against_the_bias() -> None:
    features, prompts, attribute = _images(600, [0.1, 0.9], apart=9.0)
    found = find_hidden_attributes(features, prompts, QUICK)[0]
    against = attribute != prompts
    assert found.conflict[against].min() > found.conflict[~against].max()
    # -log(own share / mean share) of a value that is certain.
    share = float((attribute[prompts == 0] == 1).double().mean())
    other = float((attribute[prompts == 1] == 1).double().mean())
    expected = -torch.tensor(share / ((share + other) / 2)).log()
    mean = float(found.conflict[against & (prompts == 0)].mean())
    assert mean == pytest.approx(float(expected), abs=0.05)


def test_two_biases_at_once_are_the_first_two_candidates() -> None:
    source = torch.Generator().manual_seed(1)
    prompts = torch.arange(1200) % 2
    usual = torch.tensor([[0.05, 0.95], [0.2, 0.8]])[:, prompts]
    both = (torch.rand(2, 1200, generator=source) < usual).long()
    features = torch.randn(1200, 8, generator=source)
    features[:, :2] += 5.0 * both.T
    first, second = find_hidden_attributes(features, prompts, QUICK)[:2]
    assert (first.verdict, second.verdict) == ("bias", "bias")
    found = [[_agreement(each.memberships, one) for one in both] for each in (first, second)]
    right = max((found[0][0], found[1][1]), (found[0][1], found[1][0]), key=sum)
    assert min(right) > 0.97


def test_an_attribute_in_equal_shares_is_no_bias() -> None:
    features, prompts, _ = _images(600, [0.5, 0.5])
    assert all(each.verdict != "bias" for each in find_hidden_attributes(features, prompts, QUICK))


def test_groups_that_differ_in_other_ways_in_each_prompt_are_unaligned() -> None:
    features, prompts, _ = _images(600, [0.2, 0.8], directions=2)
    found = find_hidden_attributes(features, prompts, QUICK)
    assert all(each.verdict != "bias" for each in found)


def test_what_is_named_alone_is_no_bias() -> None:
    features, prompts, _ = _images(600, [0.0, 0.0])
    assert all(each.verdict != "bias" for each in find_hidden_attributes(features, prompts, QUICK))


def test_an_attribute_of_many_values_is_found() -> None:
    source = torch.Generator().manual_seed(0)
    count = 1500
    prompts = torch.arange(count) % 2
    place = (torch.rand(count, generator=source) < torch.tensor([0.1, 0.9])[prompts]).long()
    scene = torch.randint(8, (count,), generator=source) + 8 * place
    assert len(torch.stack([scene, prompts]).unique(dim=1).T) == 32  # both prompts show all
    features = torch.randn(16, 8, generator=source)[scene] * 6
    features = features + torch.randn(count, 8, generator=source) + prompts[:, None]
    settings = replace(QUICK, components=8, values=(16,))
    found = find_hidden_attributes(features, prompts, settings)[0]
    assert found.memberships.shape[1] == 16
    assert found.verdict == "bias"
    against = place != prompts
    higher = found.conflict[against].median() > found.conflict[~against].quantile(0.99)
    assert bool(higher)


def test_p_values_are_not_too_small_where_prompts_differ_in_means_only() -> None:
    settings = replace(QUICK, starts=6, components=4, least_difference=0.0, alpha=0.4)
    smallest = []
    for seed in range(16):
        features, prompts, _ = _images(200, [0.5, 0.5], apart=4.0, seed=100 + seed)
        found = find_hidden_attributes(features[:, :4], prompts, settings)
        smallest.append(min((each.p_value for each in found), default=1.0))
    values = torch.tensor(smallest)
    # At a level of 0.2 at most 6 of 16 with probability 0.973; alignment only makes p larger.
    assert int((values <= 0.2).sum()) <= 6
    assert int((values <= 0.4).sum()) <= 11


def test_one_prompt_or_a_handful_of_images_is_untestable() -> None:
    features, prompts, attribute = _images(600, [0.3])
    found = find_hidden_attributes(features, prompts, QUICK)[0]
    assert found.verdict == "untestable"
    assert found.p_value == 1.0
    assert _agreement(found.memberships, attribute) > 0.99
    features, prompts, _ = _images(12, [0.3, 0.7])
    assert {each.verdict for each in find_hidden_attributes(features, prompts, QUICK)} <= {
        "untestable"
    }


def test_prompts_of_few_images_are_compared_together() -> None:
    source = torch.Generator().manual_seed(1)
    shares = torch.rand(300, generator=source).tolist()
    features, prompts, attribute = _images(1800, shares, apart=8.0)
    features[:, 0] = torch.randn(1800, generator=source) + (prompts % 7)
    found = find_hidden_attributes(features, prompts, QUICK)[0]
    # Where all six images of a prompt have one value, nothing tells which it is.
    counts = torch.zeros(300).index_add(0, prompts, attribute.float())
    mixed = ((counts > 0) & (counts < 6))[prompts]
    assert _agreement(found.memberships[mixed], attribute[mixed]) > 0.95
    assert found.verdict == "bias"
    assert found.shares.shape == (300, 2)


def test_all_images_are_assigned_where_some_are_searched() -> None:
    features, prompts, attribute = _images(3000, [0.1, 0.9])
    some = replace(QUICK, most_images=500)
    found = find_hidden_attributes(features.half(), prompts, some)[0]
    assert _agreement(found.memberships, attribute) > 0.99
    assert found.verdict == "bias"


def test_a_prompt_without_images_has_no_shares() -> None:
    features, prompts, _ = _images(900, [0.1, 0.9])
    found = find_hidden_attributes(features, prompts * 2, QUICK)[0]
    assert found.shares.shape == (3, 2)
    assert found.shares[1].isnan().all()
    assert found.conflict.isfinite().all()
    assert found.verdict == "bias"


def test_the_result_depends_on_the_seed_alone() -> None:
    features, prompts, _ = _images(600, [0.2, 0.8])
    first, second = (find_hidden_attributes(features, prompts, QUICK)[0] for _ in range(2))
    torch.testing.assert_close(first.conflict, second.conflict, rtol=0, atol=0)
    assert first.p_value == second.p_value


def test_features_that_do_not_vary_hold_no_attribute() -> None:
    assert find_hidden_attributes(torch.ones(50, 3), torch.arange(50) % 2, QUICK) == []


def test_wrong_shapes_and_values_are_refused() -> None:
    with pytest.raises(InvDiffError, match=r"expected features \[N, F\]"):
        find_hidden_attributes(torch.ones(5, 3), torch.zeros(4, dtype=torch.long))
    broken = torch.ones(5, 3)
    broken[2, 1] = torch.nan
    with pytest.raises(InvDiffError, match="image 2"):
        find_hidden_attributes(broken, torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("settings", [{"alpha": 0.04}, {"alpha": 0.2, "resamples": 3}])
def test_a_level_that_no_p_value_reaches_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InvDiffError, match=r"expected alpha from 1/\(resamples \+ 1\)"):
        HiddenAttributeSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rarer", "expected"), [(0.1, True), (0.5, False)])
def test_of_hundreds_of_small_prompts_only_what_differs_is_a_bias(
    rarer: float, expected: bool
) -> None:
    source = torch.Generator().manual_seed(0)
    prompts = torch.arange(2400) // 6
    shares = torch.where(torch.rand(400, generator=source) < 0.5, rarer, 1 - rarer)
    upper = torch.rand(2400, generator=source) < shares[prompts]
    features = torch.randn(2400, 4, generator=source)
    features[:, 0] = 0.6 * features[:, 0] + 3 * upper
    settings = HiddenAttributeSettings(starts=20, values=())
    found = find_hidden_attributes(features, prompts, settings)
    assert [each.verdict == "bias" for each in found] == [expected] + [False] * (len(found) - 1)


def test_many_values_that_came_down_to_two_in_fewer_components_are_a_candidate(monkeypatch) -> None:
    features, prompts, attribute = _images(600, [0.1, 0.9])

    def many_only(space: Space, starts: int, values: Sequence[int], *others: Any) -> list[Judged]:
        few = space.leading(7)
        fit = fit_values(few, one_hot(attribute, 2).double())
        return judge([fit], values[0], few, parts_of(few.prompts), 0.3)

    monkeypatch.setattr(hidden_attribute, "search", many_only)
    (found,) = find_hidden_attributes(features, prompts, replace(QUICK, values=(8,)))
    assert found.verdict == "bias"
    assert _agreement(found.memberships, attribute) > 0.9
