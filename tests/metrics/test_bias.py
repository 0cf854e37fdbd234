import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from invdiff_pl.metrics import (
    BiasScore,
    bias_statistics,
    pairwise_bias,
    small_sample_bias,
)
from invdiff_pl.utils.errors import InvDiffError


def labels_of(counts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """One (prompt, attribute) pair per counted sample."""
    table = torch.tensor(counts)
    cells = torch.repeat_interleave(torch.arange(table.numel()), table.flatten())
    return cells // table.shape[1], cells % table.shape[1]


def score_of(counts: list[list[int]]) -> BiasScore:
    score = BiasScore(num_prompts=len(counts), num_classes=len(counts[0]))
    score.update(*labels_of(counts))
    return score


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([50, 50], 0.0),
        ([90, 10], 0.8),
        ([0, 7], 1.0),
        ([25, 25, 25, 25], 0.0),
        ([0, 0, 12, 0], 0.5),
        ([95, 5], 0.90),  # Waterbirds
        ([100, 200], 1 / 3),  # CelebA 1:2
        ([100, 400], 0.6),  # CelebA 1:4
        ([100, 800], 7 / 9),  # CelebA 1:8
        ([300, 200, 100, 100], 1 / 6),  # FairFace 3:2:1:1, pairs (1+2+2+1+1+0)/7 over 6
    ],
)
def test_bias_equals_the_value_worked_out_by_hand(counts: list[int], expected: float) -> None:
    result = score_of([counts]).compute()
    torch.testing.assert_close(result["bias"], torch.tensor([expected], dtype=torch.float64))


def test_bias_equals_the_sum_over_pairs_of_classes() -> None:
    counts = torch.randint(0, 50, (20, 5), generator=torch.Generator().manual_seed(0))
    shares = counts / counts.sum(-1, keepdim=True)
    pairs = torch.combinations(torch.arange(5))
    expected = (shares[:, pairs[:, 0]] - shares[:, pairs[:, 1]]).abs().sum(-1) * 2 / (5 * 4)
    torch.testing.assert_close(pairwise_bias(shares), expected)


def test_distances_to_uniform_equal_the_values_worked_out_by_hand() -> None:
    result = score_of([[90, 10], [5, 0]]).compute()
    torch.testing.assert_close(result["total_variation"].tolist(), [0.4, 0.5])
    kl = torch.tensor([0.9, 0.1]).double() @ torch.tensor([1.8, 0.2]).double().log()
    torch.testing.assert_close(result["kl"].tolist(), [kl.item(), torch.tensor(2.0).log().item()])


def test_distances_to_a_stated_target_equal_the_values_worked_out_by_hand() -> None:
    target = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    score = BiasScore(num_prompts=2, num_classes=2, target=target)
    score.update(*labels_of([[9, 1], [3, 1]]))
    result = score.compute()
    torch.testing.assert_close(result["total_variation"].tolist(), [0.0, 0.25], atol=1e-7, rtol=0)
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(result["kl"].tolist(), [0.0, expected.item()], atol=1e-6, rtol=0)
    assert result["bias"].tolist() == pytest.approx([0.8, 0.5])  # Bias is always to balance
    one = BiasScore(num_prompts=2, num_classes=2, target=torch.tensor([0.75, 0.25]))
    one.update(*labels_of([[3, 1], [6, 2]]))
    assert pickle.loads(pickle.dumps(one)).compute()["total_variation"].tolist() == [0, 0]


@pytest.mark.parametrize("target", [[0.5, 0.6], [1.0, 0.0], [0.5, 0.25, 0.25], [[0.5, 0.5]] * 3])
def test_targets_that_are_no_positive_distribution_are_refused(target: list[Any]) -> None:
    with pytest.raises(InvDiffError, match="target distribution must"):
        BiasScore(num_prompts=2, num_classes=2, target=torch.tensor(target))


def test_bias_over_two_attributes_sees_what_either_alone_hides() -> None:
    # Old men and young women only: balanced over age and over gender.
    score = BiasScore(num_prompts=1, num_classes=(2, 2))
    gender = torch.tensor([0, 1] * 10)
    score.update(torch.zeros(20, dtype=torch.long), gender, gender)
    joint = score.compute()
    assert joint["counts"].tolist() == [[10, 0, 0, 10]]
    assert joint["bias"].item() == pytest.approx(2 / (4 * 3) * 4 * 0.5)  # four of six pairs differ


def test_counts_of_two_attributes_add_up_to_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts, first, second = (torch.randint(high, (50,), generator=generator) for high in (2, 2, 3))
    score = BiasScore(2, (2, 3))
    score.update(prompts, first, second)
    both = pickle.loads(pickle.dumps(score)).compute()["counts"].unflatten(1, (2, 3))
    for labels, classes, axis in ((first, 2, 2), (second, 3, 1)):
        alone = BiasScore(2, classes)
        alone.update(prompts, labels)
        assert torch.equal(both.sum(axis), alone.compute()["counts"])
    with pytest.raises(InvDiffError, match=r"attribute 2 labels must lie in 0\.\.2, found 3"):
        score.update(prompts, first, torch.full((50,), 3))
    with pytest.raises(InvDiffError, match="counts 2 attributes, found 1"):
        score.update(prompts, first)


def test_mean_and_population_deviation_leave_out_prompts_without_samples() -> None:
    result = score_of([[90, 10], [0, 0], [70, 30]]).compute()
    assert result["bias"].isnan().tolist() == [False, True, False]
    assert result["interval"].isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert result["mean"].item() == pytest.approx(0.6)
    assert result["std"].item() == pytest.approx(0.2)
    assert not result["mean_interval"].isnan().any()


def test_every_figure_of_a_score_without_samples_is_nan() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        result = BiasScore(num_prompts=2, num_classes=3).compute()
    assert result.pop("counts").sum() == 0
    assert all(figure.isnan().all() for figure in result.values())


def test_one_prompt_keeps_its_dimension() -> None:
    result = score_of([[3, 1]]).compute()
    shapes = {name: list(value.shape) for name, value in result.items()}
    assert shapes == {
        "bias": [1],
        "mean": [],
        "std": [],
        "interval": [1, 2],
        "mean_interval": [2],
        "corrected": [1],
        "corrected_mean": [],
        "total_variation": [1],
        "kl": [1],
        "small_sample_bias": [1],
        "counts": [1, 2],
    }
    restored = pickle.loads(pickle.dumps(score_of([[3, 1]])))
    assert list(restored.compute()["bias"].shape) == [1]


def test_small_sample_bias_at_two_classes_is_near_its_asymptote() -> None:
    n = torch.tensor([256, 1024])
    expected = (2 / torch.pi / n.double()).sqrt()
    torch.testing.assert_close(small_sample_bias(n, 2), expected, rtol=2e-3, atol=0)
    assert small_sample_bias(n, 2)[0].item() == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 2, 15, 128])
def test_small_sample_bias_is_the_mean_of_simulated_balanced_samplers(classes: int, n: int) -> None:
    torch.manual_seed(0)
    draws = torch.distributions.Multinomial(n, torch.ones(classes)).sample((20000,))
    simulated = pairwise_bias(draws.double() / n)
    error = 5 * simulated.std().item() / 20000**0.5 + 1e-12
    assert small_sample_bias(torch.tensor(n), classes).item() == pytest.approx(
        simulated.mean().item(), abs=error
    )


def test_small_sample_bias_keeps_shape_and_stays_finite_for_a_whole_data_set() -> None:
    value = small_sample_bias(torch.tensor([[162_770, 0], [1, 162_770]]), 4)
    assert value.isnan().tolist() == [[False, True], [False, False]]
    assert value[0, 0] == value[1, 1]
    # Two of four classes: the difference has variance 2n/4, so its mean size is sqrt(n / pi).
    assert value[0, 0].item() == pytest.approx((1 / (torch.pi * 162_770)) ** 0.5, rel=1e-4)


def test_counts_do_not_depend_on_batches_or_their_order() -> None:
    prompts, attributes = labels_of([[3, 9, 1], [4, 0, 7]])
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1))
    score = BiasScore(num_prompts=2, num_classes=3)
    for part in order.split([1, 0, 10, len(order) - 11]):
        score.update(prompts[part].int(), attributes[part])
    assert score.counts.tolist() == [[3, 9, 1], [4, 0, 7]]


def test_a_pickled_or_cloned_score_goes_on_counting_on_its_own() -> None:
    score = score_of([[3, 1], [2, 2]])
    for copy in (pickle.loads(pickle.dumps(score)), score.clone()):
        copy.update(torch.tensor([0]), torch.tensor([1]))
        assert copy.compute()["counts"].tolist() == [[3, 2], [2, 2]]
    assert score.compute()["counts"].tolist() == [[3, 1], [2, 2]]
    score.reset()
    assert score.counts.sum() == 0


def test_statistics_of_a_table_equal_those_of_its_samples() -> None:
    counts = [[30, 5, 1], [4, 9, 7]]
    expected = score_of(counts).compute()
    actual = bias_statistics(torch.tensor(counts))
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("prompts", "attributes", "message"),
    [
        (torch.tensor([0, 2]), torch.tensor([0, 0]), r"prompt labels must lie in 0\.\.1, found 2"),
        (torch.tensor([0]), torch.tensor([-1]), r"attribute labels must lie in 0\.\.2, found -1"),
        (torch.tensor([0]), torch.tensor([0.5]), "attribute labels must be integers"),
        (torch.tensor([0]), torch.tensor([0, 1]), "one prompt and one attribute per sample"),
    ],
)
def test_bad_labels_are_refused_and_leave_the_counts_alone(
    prompts: Tensor, attributes: Tensor, message: str
) -> None:
    score = BiasScore(num_prompts=2, num_classes=3)
    with pytest.raises(InvDiffError, match=message):
        score.update(prompts, attributes)
    assert score.counts.sum() == 0


@pytest.mark.parametrize("arguments", [(0, 2), (1, 1), (1, 2, 1.0)])
def test_impossible_settings_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InvDiffError, match="must"):
        BiasScore(*arguments)
