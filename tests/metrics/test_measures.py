"""Measures of uneven shares against values by hand, each other, and simulation."""

import math

import pytest
import torch
from torch import Tensor

from invdiff_pl.metrics import (
    MEASURES,
    BiasScore,
    DeviationRatio,
    FairnessDiscrepancy,
    KLDivergence,
    Measure,
    NormalizedEntropy,
    ParityGap,
    measured,
    share_interval,
)
from invdiff_pl.metrics.bias import ShareMeasure
from invdiff_pl.metrics.measures import (
    BIAS,
    DEVIATION_RATIO,
    FAIRNESS_DISCREPANCY,
    KL_DIVERGENCE,
    NORMALIZED_ENTROPY,
    PARITY_GAP,
)

BY_NAME = [pytest.param(measure, id=measure.name) for measure in MEASURES]
CLASSES = {
    FAIRNESS_DISCREPANCY: FairnessDiscrepancy,
    DEVIATION_RATIO: DeviationRatio,
    PARITY_GAP: ParityGap,
    KL_DIVERGENCE: KLDivergence,
    NORMALIZED_ENTROPY: NormalizedEntropy,
}


def random_shares(rows: int, classes: int, seed: int = 0) -> Tensor:
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))
    return logits.double().softmax(-1)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (BIAS, (0.3 + 0.5 + 0.2) * 2 / 6),  # pairs of 0.6, 0.3 and 0.1
        (FAIRNESS_DISCREPANCY, math.sqrt((8**2 + 1**2 + 7**2) / 30**2)),
        (DEVIATION_RATIO, (0.6 - 1 / 3) * 3 / 2),
        (PARITY_GAP, (8 + 1 + 7) / 30 / 3),
        (KL_DIVERGENCE, 0.6 * math.log(1.8) + 0.3 * math.log(0.9) + 0.1 * math.log(0.3)),
        (
            NORMALIZED_ENTROPY,
            -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1)) / math.log(3),
        ),
    ],
)
def test_measures_of_three_shares_equal_values_by_hand(measure: Measure, expected: float) -> None:
    shares = torch.tensor([0.3, 0.6, 0.1]).double()
    assert float(measure(shares)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (BIAS, 0.4),  # |(0.9 - 0.7) - (0.1 - 0.3)|
        (FAIRNESS_DISCREPANCY, 0.2 * math.sqrt(2)),
        (DEVIATION_RATIO, 0.2 / 0.7),
        (PARITY_GAP, 0.2),
        (KL_DIVERGENCE, 0.9 * math.log(9 / 7) + 0.1 * math.log(1 / 3)),
        (
            NORMALIZED_ENTROPY,
            1 - (0.9 * math.log(9 / 7) + 0.1 * math.log(1 / 3)) / math.log(1 / 0.3),
        ),
    ],
)
def test_measures_to_a_target_equal_values_by_hand(measure: Measure, expected: float) -> None:
    found = measure(torch.tensor([0.9, 0.1]).double(), torch.tensor([0.7, 0.3]).double())
    assert float(found) == pytest.approx(expected, abs=1e-7)


def test_measures_of_two_classes_are_one_figure_in_different_units() -> None:
    shares = random_shares(50, 2)
    bias = BIAS(shares)
    torch.testing.assert_close(FAIRNESS_DISCREPANCY(shares), bias / math.sqrt(2))
    torch.testing.assert_close(DEVIATION_RATIO(shares), bias)
    torch.testing.assert_close(PARITY_GAP(shares), bias / 2)
    entropy = NORMALIZED_ENTROPY(shares)
    torch.testing.assert_close(entropy, 1 - KL_DIVERGENCE(shares) / math.log(2))


@pytest.mark.parametrize("measure", BY_NAME)
@pytest.mark.parametrize("target", [None, torch.tensor([0.5, 0.2, 0.3]).double()])
def test_measures_are_least_uneven_at_the_target_and_most_at_its_rarest_class(
    measure: Measure, target: Tensor | None
) -> None:
    wanted = torch.ones(3).double() / 3 if target is None else target
    assert float(measure(wanted, target)) == pytest.approx(measure.at_target, abs=1e-9)
    values = measure.sign * measure(random_shares(200, 3), target)
    assert bool((values >= measure.sign * measure.at_target - 1e-9).all())
    corners = measure.sign * measure(torch.eye(3).double(), target)
    assert bool((values <= corners.max()).all())
    assert float(corners[1]) == pytest.approx(float(corners.max()))


@pytest.mark.parametrize("measure", BY_NAME)
def test_gradients_are_those_of_the_formulas(measure: Measure) -> None:
    shares = random_shares(20, 4).requires_grad_()
    target = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    (expected,) = torch.autograd.grad(measure(shares, target).sum(), shares)
    found = measure.gradient(shares.detach(), target)
    # Up to a constant, which does not count where shares sum to 1.
    centred = [values - values.mean(-1, keepdim=True) for values in (found, expected)]
    torch.testing.assert_close(*centred)


def test_intervals_of_two_classes_are_that_of_bias_in_other_units() -> None:
    counts = torch.tensor([[90, 10], [52, 48], [0, 7], [30, 70]])
    bias = share_interval(counts)
    for measure, unit in ((FAIRNESS_DISCREPANCY, 2**-0.5), (DEVIATION_RATIO, 1), (PARITY_GAP, 0.5)):
        torch.testing.assert_close(share_interval(counts, measure=measure), unit * bias)
    divergence = share_interval(counts, measure=KL_DIVERGENCE)
    entropy = share_interval(counts, measure=NORMALIZED_ENTROPY)
    torch.testing.assert_close(entropy, 1 - divergence.flip(-1) / math.log(2))


@pytest.mark.parametrize("classes", range(2, 12))
def test_no_measure_or_interval_of_one_class_only_is_below_zero(classes: int) -> None:
    counts = 24 * torch.eye(classes, dtype=torch.long)
    for measure in MEASURES:
        assert not measure(counts.double() / 24).signbit().any()
        assert not share_interval(counts, measure=measure).signbit().any()


@pytest.mark.parametrize("measure", BY_NAME)
@pytest.mark.parametrize("target", [None, [0.4, 0.3, 0.2, 0.1]])
def test_intervals_of_four_classes_hold_the_truth(
    measure: Measure, target: list[float] | None
) -> None:
    aim = None if target is None else torch.tensor(target).double()
    for shares in ([0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]):
        truth = torch.tensor(shares).double()
        generator = torch.Generator().manual_seed(1)
        draws = torch.multinomial(truth, 100 * 128, replacement=True, generator=generator)
        counts = torch.nn.functional.one_hot(draws, 4).view(100, 128, 4).sum(1)
        low, high = share_interval(counts, 0.95, measure, aim).unbind(-1)
        value = measure(truth, aim)
        covered = ((low - 1e-6 <= value) & (value <= high + 1e-6)).double().mean()
        assert float(covered) >= 0.91, (shares, float(covered))


@pytest.mark.parametrize(("measure", "kind"), CLASSES.items(), ids=lambda each: str(each)[:20])
def test_metric_classes_give_the_measure_by_prompt_and_on_average(
    measure: Measure, kind: type[ShareMeasure]
) -> None:
    prompts = torch.tensor([0] * 10 + [1] * 8)
    labels = torch.tensor([0] * 9 + [1] + [0] * 4 + [1] * 4)
    score = kind(num_prompts=3, num_classes=2)
    for rows in torch.arange(18).split(5):
        score.update(prompts[rows], labels[rows])
    found = score.compute()
    expected = measure(torch.tensor([[0.9, 0.1], [0.5, 0.5]]).double())
    torch.testing.assert_close(found["value"][:2], expected)
    assert bool(found["value"][2].isnan())
    assert float(found["mean"]) == pytest.approx(float(expected.mean()))
    low, high = found["mean_interval"].tolist()
    assert low <= float(found["mean"]) <= high
    assert bool((found["interval"][:2, 0] <= expected).all())


def test_metric_classes_take_a_target_and_two_attributes() -> None:
    target = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    score = FairnessDiscrepancy(num_prompts=1, num_classes=(2, 2), target=target)
    first = torch.tensor([0] * 3 + [1] * 7)
    second = torch.tensor([0] + [1] * 2 + [0] * 3 + [1] * 4)
    score.update(torch.zeros(10, dtype=torch.long), first, second)
    found = score.compute()
    assert list(found["value"].shape) == [1]
    assert float(found["value"]) == pytest.approx(0, abs=1e-7)
    assert float(found["interval"][0, 0]) == 0


def test_bias_score_gives_the_same_kl_and_total_variation_as_the_measures() -> None:
    counts = torch.tensor([[5, 3, 2], [1, 1, 8]])
    score = BiasScore(num_prompts=2, num_classes=3)
    for prompt, row in enumerate(counts):
        labels = torch.arange(3).repeat_interleave(row)
        score.update(torch.full_like(labels, prompt), labels)
    found = score.compute()
    torch.testing.assert_close(found["kl"], measured(counts, KL_DIVERGENCE)["value"])
    torch.testing.assert_close(
        found["total_variation"], measured(counts, PARITY_GAP)["value"] * 3 / 2
    )
