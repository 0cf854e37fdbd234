import pytest
import torch
from torch import Tensor

from invdiff_pl.metrics import (
    correct_for_classifier,
    corrected_bias,
    mean_share_interval,
    pairwise_bias,
    share_interval,
)
from invdiff_pl.utils.errors import InvDiffError

CONFUSION = torch.tensor([[135, 15], [30, 120]])
RATES = CONFUSION.double() / CONFUSION.sum(1, keepdim=True)


def drawn(shares: Tensor, n: int, times: int) -> Tensor:
    return torch.distributions.Multinomial(n, shares.double()).sample((times,)).long()


@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize(
    "shares", [[0.5, 0.5], [0.52, 0.48], [0.25] * 4, [3 / 7, 2 / 7, 1 / 7, 1 / 7]]
)
def test_the_corrected_bias_errs_less_upwards_than_the_plain_one(
    shares: list[float], n: int
) -> None:
    torch.manual_seed(0)
    true = torch.tensor(shares).double()
    counts = drawn(true, n, 4000)
    plain = (pairwise_bias(counts / n) - pairwise_bias(true)).mean()
    corrected = (corrected_bias(counts) - pairwise_bias(true)).mean()
    assert 0 <= corrected < 0.75 * plain


def test_the_corrected_bias_is_the_plain_one_where_samples_are_many_or_one_sided() -> None:
    counts = torch.tensor([[90, 10], [0, 7], [600, 400], [50, 50]])
    plain = pairwise_bias(counts / counts.sum(1, keepdim=True).double())
    torch.testing.assert_close(corrected_bias(counts), plain, atol=1e-3, rtol=0)
    assert (corrected_bias(counts) <= plain).all()
    assert corrected_bias(torch.tensor([0, 0])).isnan()


def test_rates_behind_expected_counts_are_found_exactly() -> None:
    true = torch.tensor([[0.3, 0.7], [0.95, 0.05]]).double()
    counts = 1_000_000 * true @ RATES
    found = correct_for_classifier(counts.round().long(), CONFUSION)
    torch.testing.assert_close(found.shares, true, atol=1e-6, rtol=0)
    assert found.bias.tolist() == pytest.approx([0.4, 0.9], abs=1e-5)
    assert float(found.mean) == pytest.approx(0.65, abs=1e-5)


def test_a_faultless_classifier_changes_next_to_nothing() -> None:
    counts = torch.tensor([[200, 56], [130, 126], [0, 0]])
    found = correct_for_classifier(counts, torch.tensor([[100_000, 0], [0, 100_000]]))
    assert found.bias[:2].tolist() == pytest.approx([144 / 256, 4 / 256])
    assert found.shares[2].isnan().all()
    torch.testing.assert_close(found.interval[:2], share_interval(counts)[:2], atol=0.02, rtol=0)
    torch.testing.assert_close(found.mean_interval, mean_share_interval(counts), atol=0.02, rtol=0)


def test_shares_beyond_what_errors_explain_are_put_on_the_simplex() -> None:
    found = correct_for_classifier(torch.tensor([[100, 0], [0, 100]]), CONFUSION)
    assert found.shares.tolist() == [[1, 0], [0, 1]]
    # Three classes: the nearest distribution to (1.2, 0.3, -0.5) is (0.95, 0.05, 0).
    from invdiff_pl.metrics.correction import _onto_simplex

    nearest = _onto_simplex(torch.tensor([[1.2, 0.3, -0.5]]))
    torch.testing.assert_close(nearest, torch.tensor([[0.95, 0.05, 0.0]]))


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_intervals_hold_the_errors_of_samples_and_of_the_classifier(share: float) -> None:
    torch.manual_seed(0)
    true = torch.tensor([share, 1 - share]).double()
    bias = pairwise_bias(true)
    single: list[Tensor] = []
    mean: list[Tensor] = []
    for _ in range(150):
        confusion = torch.stack([drawn(row, 150, 1)[0] for row in RATES])
        found = correct_for_classifier(drawn(true @ RATES, 256, 3), confusion)
        for ends, hits in ((found.interval, single), (found.mean_interval[None], mean)):
            hits.append(((ends[:, 0] <= bias + 1e-9) & (bias <= ends[:, 1] + 1e-9)).double().mean())
    assert torch.stack(single).mean() >= 0.93
    assert torch.stack(mean).mean() >= 0.93


@pytest.mark.parametrize(
    ("confusion", "message"),
    [
        ([[50, 50], [50, 50]], "hardly tells"),
        ([[50, 50], [0, 0]], "every class in it"),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], r"takes a \[2, 2\] table"),
    ],
)
def test_confusions_that_cannot_be_inverted_are_refused(confusion: list, message: str) -> None:
    with pytest.raises(InvDiffError, match=message):
        correct_for_classifier(torch.tensor([[3, 4]]), torch.tensor(confusion))
