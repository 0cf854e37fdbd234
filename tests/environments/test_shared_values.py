"""Fitting values that prompts share, against the likelihood written out and other references."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from invdiff_pl.environments.shared_values import (
    fit_shares,
    fit_values,
    kmeans_memberships,
    log_likelihood_ratio,
    memberships_of,
)
from invdiff_pl.environments.space import Space, prompt_means, whiten
from invdiff_pl.environments.two_values import two_value_fits


def _space(count: int = 600, seed: int = 0) -> tuple[Space, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    prompts = torch.arange(count) % 3
    value = (torch.rand(count, generator=source) < torch.tensor([0.2, 0.5, 0.8])[prompts]).long()
    features = torch.randn(count, 4, generator=source).double()
    features = features + 4 * value[:, None] * torch.tensor([1.0, 0, -1, 0])
    features = features + 5 * prompts[:, None]
    space = whiten(features, prompts, 4)
    assert space is not None
    return space, prompts, value


def test_whitened_values_have_mean_zero_by_prompt_and_unit_covariance() -> None:
    space, prompts, _ = _space()
    values = space.values
    torch.testing.assert_close(prompt_means(values, prompts), torch.zeros(3, 4).double())
    covariance = values.T @ values / (len(values) - 3)
    torch.testing.assert_close(covariance, torch.eye(4).double())


def test_other_images_are_placed_as_those_that_the_space_was_made_of() -> None:
    source = torch.Generator().manual_seed(0)
    features, prompts = torch.randn(90, 5, generator=source), torch.arange(90) % 3
    space = whiten(features, prompts, 3)
    assert space is not None
    torch.testing.assert_close(space.of(features, prompts), space.values)


def test_the_likelihood_is_that_of_the_model_written_out() -> None:
    space, prompts, value = _space(90)
    start = torch.nn.functional.one_hot(value, 2).double() * 0.8 + 0.1
    fit = fit_values(space, start, rounds=5)
    covariance = torch.linalg.inv(fit.precision)
    for image in (0, 1, 50):
        prompt = int(prompts[image])
        place = fit.places[prompt]
        density = torch.zeros(()).double()
        for k in range(2):
            apart = space.values[image] - place - fit.delta[k]
            square = apart @ fit.precision @ apart
            normal = math.exp(-0.5 * float(square)) / math.sqrt(
                float(torch.linalg.det(2 * math.pi * covariance))
            )
            density = density + fit.shares[prompt, k] * normal
        torch.testing.assert_close(fit.log_likelihood[image], density.log())


def test_rounds_never_lower_the_likelihood() -> None:
    space, _, _ = _space()
    start = kmeans_memberships(space.values, 3, torch.Generator().manual_seed(1)) * 0.9 + 1 / 30
    likelihoods = [
        float(fit_values(space, start, rounds).log_likelihood.sum()) for rounds in range(1, 25)
    ]
    # Shares are drawn a little towards the mean: with their prior, not alone, it never falls.
    assert all(b > a - 0.2 for a, b in pairwise(likelihoods))
    assert likelihoods[-1] > likelihoods[0] + 10


def test_a_step_is_the_normal_equations_solved_by_least_squares() -> None:
    space, prompts, value = _space()
    certain = torch.nn.functional.one_hot(value, 2).double()
    fit = fit_values(space, certain, rounds=1)
    # With certain memberships: regression on the value and an intercept a prompt.
    design = torch.cat([value[:, None].double(), torch.nn.functional.one_hot(prompts, 3)], dim=1)
    solved = torch.linalg.lstsq(design, space.values).solution
    torch.testing.assert_close(fit.delta[1] - fit.delta[0], solved[0])
    residual = space.values - design @ solved
    torch.testing.assert_close(
        torch.linalg.inv(fit.precision), residual.T @ residual / len(residual)
    )


def test_two_values_climbed_along_lines_are_fixed_points_of_the_full_fit() -> None:
    space, _, value = _space()
    best = two_value_fits(space, 24, torch.Generator().manual_seed(0))[0]
    full = fit_values(space, best.memberships, 100)
    assert float((full.memberships - best.memberships).abs().max()) < 1e-2
    agreement = float((best.memberships.argmax(1) == value).double().mean())
    assert max(agreement, 1 - agreement) > 0.97


def test_the_ratio_is_chi_square_where_shares_are_equal() -> None:
    ratios = []
    for seed in range(60):
        source = torch.Generator().manual_seed(seed)
        prompts = torch.arange(400) % 2
        value = torch.rand(400, generator=source) < 0.5
        features = torch.randn(400, 2, generator=source) + 6 * value[:, None]
        space = whiten(features, prompts, 2)
        assert space is not None
        fit = fit_values(space, torch.stack([~value, value], dim=1).double())
        ratios.append(log_likelihood_ratio(fit, space))
    values = torch.tensor(ratios)
    # One degree of freedom: mean 1 (0.18 its standard error), 3.84 is passed in 5 %.
    assert 0.5 < float(values.mean()) < 1.6
    assert int((values > 3.84).sum()) <= 8


def test_shares_of_other_images_follow_from_the_fit() -> None:
    space, prompts, value = _space(1200)
    fit = fit_values(space, torch.nn.functional.one_hot(value, 2).double())
    half = torch.arange(1200) < 600
    values = space.rows(half).values
    members, shares = memberships_of(fit, values, prompts[half])
    true = torch.stack([value[half][prompts[half] == p].double().mean() for p in range(3)])
    assert (shares[:, 1] - true).abs().max() < 0.03
    assert float((members.argmax(1) == value[half]).double().mean()) > 0.97
    own, equal = (
        fit_shares(fit, values, prompts[half], equal=each).log_likelihood(
            fit, values, prompts[half]
        )
        for each in (False, True)
    )
    assert equal < own


def test_dealt_residuals_differ_between_prompts_in_means_only() -> None:
    space, prompts, _ = _space(3000)
    dealt = space.dealt(torch.Generator().manual_seed(0), torch.zeros(3, 4).double())
    third = prompt_means(dealt.values**3, prompts)
    assert float(third.abs().max()) < 0.3
    torch.testing.assert_close(prompt_means(dealt.values, prompts), torch.zeros(3, 4).double())
