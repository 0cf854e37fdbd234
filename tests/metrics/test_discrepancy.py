import pickle

import pytest
import torch

from invdiff_pl.metrics import MaximumMeanDiscrepancy, manifold, squared_discrepancy
from invdiff_pl.utils.errors import InvDiffError

REAL = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)))
GENERATED = torch.nn.functional.normalize(
    torch.randn(30, 8, generator=torch.Generator().manual_seed(2)) + 0.5
)


def test_the_discrepancy_is_the_mean_kernel_over_all_pairs() -> None:
    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (-torch.cdist(a.double(), b.double()).square() / (2 * 10.0**2)).exp().mean()

    expected = 1000 * (
        kernel(REAL, REAL) + kernel(GENERATED, GENERATED) - 2 * kernel(REAL, GENERATED)
    )
    metric = MaximumMeanDiscrepancy(8)
    for part in REAL.split(7):
        metric.update(part, real=True)
    metric.update(GENERATED, real=False)
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-9)
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert copy.compute().item() == metric.compute().item()


def test_it_equals_torch_fidelitys_biased_estimate() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = REAL[:30].double().numpy(), GENERATED.double().numpy()
    kernels = [kid.kernel_rbf(x, y, kid_kernel_rbf_sigma=10) for x, y in ((a, a), (a, b), (b, b))]
    found = squared_discrepancy(REAL[:30], GENERATED, 10.0).item()
    assert found == pytest.approx(kid.mmd2(*kernels, mmd_est="biased"), rel=1e-6)


def test_it_is_the_squared_distance_of_two_points_in_feature_space() -> None:
    a, b = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    expected = 2 - 2 * torch.tensor(-25 / 2).exp().item()
    assert squared_discrepancy(a, b, 1.0).item() == pytest.approx(expected)
    assert squared_discrepancy(REAL, REAL, 0.5).item() == pytest.approx(0, abs=1e-15)


def test_it_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = squared_discrepancy(REAL, GENERATED, 0.5).item()
    monkeypatch.setattr(manifold, "_ENTRIES", 50)
    monkeypatch.setattr(manifold, "_COLUMNS", 4)
    assert squared_discrepancy(REAL, GENERATED, 0.5).item() == pytest.approx(whole, rel=1e-12)


def test_an_empty_set_and_an_impossible_bandwidth_are_refused() -> None:
    metric = MaximumMeanDiscrepancy(8)
    metric.update(REAL, real=True)
    with pytest.raises(InvDiffError, match="at least 1 generated images, found 0"):
        metric.compute()
    with pytest.raises(InvDiffError, match="must be positive"):
        MaximumMeanDiscrepancy(8, bandwidth=0)
