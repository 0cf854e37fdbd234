"""Precision, recall, density and coverage."""

from pathlib import Path

import pytest
import torch
from child_processes import run_ranks
from torch import Tensor
from torch import distributed as dist

from invdiff_pl.metrics import ManifoldScores, manifold
from invdiff_pl.metrics.manifold import manifold_scores
from invdiff_pl.utils.errors import InvDiffError

REAL = torch.randn(83, 6, generator=torch.Generator().manual_seed(1))
GENERATED = 0.6 * torch.randn(61, 6, generator=torch.Generator().manual_seed(2)) + 0.4


def _by_loops(real: Tensor, generated: Tensor, k: int) -> dict[str, float]:
    """The definitions, one pair at a time."""

    def radius(points: Tensor, i: int) -> float:
        return sorted((points[i] - other).norm().item() for other in points)[k]

    def inside(point: Tensor, centre: Tensor, reach: float) -> bool:
        return (point - centre).norm().item() <= reach

    real, generated = real.double(), generated.double()
    real_reach = [radius(real, i) for i in range(len(real))]
    generated_reach = [radius(generated, i) for i in range(len(generated))]
    hits = torch.tensor(
        [
            [inside(g, r, reach) for r, reach in zip(real, real_reach, strict=True)]
            for g in generated
        ]
    )
    back = [
        any(inside(r, g, reach) for g, reach in zip(generated, generated_reach, strict=True))
        for r in real
    ]
    return {
        "precision": hits.any(1).double().mean().item(),
        "recall": sum(back) / len(back),
        "density": hits.double().sum().item() / (k * len(generated)),
        "coverage": hits.any(0).double().mean().item(),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_scores_are_those_of_their_definitions(k: int) -> None:
    found = {n: float(v) for n, v in manifold_scores(REAL, GENERATED, k).items()}
    assert found == pytest.approx(_by_loops(REAL, GENERATED, k))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_torch_fidelitys(k: int) -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    precision, recall = prc.calculate_precision_recall_part(
        GENERATED.double(), REAL.double(), neighborhood=k, batch_size=20
    )
    found = manifold_scores(REAL, GENERATED, k)
    # The library averages in float32.
    assert float(found["precision"]) == pytest.approx(precision, abs=1e-6)
    assert float(found["recall"]) == pytest.approx(recall, abs=1e-6)


def test_scores_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = manifold_scores(REAL, GENERATED, 3)
    monkeypatch.setattr(manifold, "_ENTRIES", 7 * len(GENERATED))
    assert manifold_scores(REAL, GENERATED, 3) == whole


def test_a_set_against_itself_is_perfect() -> None:
    found = manifold_scores(REAL, REAL, 3)
    assert all(float(found[name]) == 1 for name in ("precision", "recall", "coverage"))


def test_one_missing_mode_lowers_recall_and_not_precision() -> None:
    other = REAL + 100
    found = manifold_scores(torch.cat([REAL, other]), REAL, 3)
    assert float(found["precision"]) == 1
    assert float(found["recall"]) == float(found["coverage"]) == 0.5


def test_batches_add_up() -> None:
    metric = ManifoldScores(6)
    for chunk in REAL.split(10):
        metric.update(chunk, real=True)
    for chunk in GENERATED.split(7):
        metric.update(chunk, real=False)
    assert metric.compute() == manifold_scores(REAL, GENERATED, 3)


def test_reset_keeps_real_images_and_forgets_generated_ones() -> None:
    metric = ManifoldScores(6)
    metric.update(REAL, real=True)
    metric.update(REAL + 100, real=False)
    metric.reset()
    metric.update(GENERATED, real=False)
    assert metric.compute() == manifold_scores(REAL, GENERATED, 3)


def test_too_few_images_and_wrong_shapes_are_refused() -> None:
    metric = ManifoldScores(6)
    metric.update(REAL, real=True)
    with pytest.raises(InvDiffError, match="at least 4 generated images, found 0"):
        metric.compute()
    with pytest.raises(InvDiffError, match=r"\[N, 6\], found \[83, 5\]"):
        metric.update(REAL[:, :5], real=True)
    with pytest.raises(InvDiffError, match="at least 1"):
        ManifoldScores(6, neighbours=0)


def _share(rank: int, world_size: int, file: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    metric = ManifoldScores(6)
    # The last rank sees no generated image, and the real ones do not divide evenly.
    metric.update(REAL[rank::world_size], real=True)
    if rank < world_size - 1:
        metric.update(GENERATED[rank :: world_size - 1], real=False)
    scores = metric.compute()
    if rank == 0:
        torch.save(scores, result)
    dist.destroy_process_group()


def test_uneven_ranks_one_of_them_empty_give_the_figures_of_one(tmp_path: Path) -> None:
    result = tmp_path / "result.pt"
    run_ranks(_share, 3, 3, str(tmp_path / "store"), str(result))
    found = torch.load(result, weights_only=True)
    expected = manifold_scores(REAL, GENERATED, 3)
    assert {n: float(v) for n, v in found.items()} == pytest.approx(
        {n: float(v) for n, v in expected.items()}
    )
