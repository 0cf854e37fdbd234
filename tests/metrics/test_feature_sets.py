"""Sets of features: one tensor each, whatever they came in."""

import pickle

import pytest
import torch
from torch import Tensor

from invdiff_pl.metrics import ManifoldScores
from invdiff_pl.utils.errors import InvDiffError

FEATURES = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))


def _fed(sizes: list[int]) -> ManifoldScores:
    metric = ManifoldScores(4)
    for chunk in FEATURES.split(sizes):
        metric.update(chunk, real=True)
        metric.update(chunk + 1, real=False)
    return metric


@pytest.mark.parametrize("sizes", [[3000], [1] * 200 + [2800], [0, 1023, 1, 1, 1975], [50] * 60])
def test_features_are_kept_as_one_tensor_in_their_order(sizes: list[int]) -> None:
    metric = _fed(sizes)
    assert len(metric.real) == len(metric.generated) == 1
    real, generated = metric.sets(1, "this test needs")
    assert torch.equal(real, FEATURES)
    assert torch.equal(generated, FEATURES + 1)


def test_room_to_spare_is_at_most_what_is_there_and_updates_move_the_set_seldom() -> None:
    metric, places = ManifoldScores(4), set()
    for chunk in FEATURES.split(10):
        metric.update(chunk, real=True)
        places.add(metric.real[0].data_ptr())
    assert len(places) <= 3  # at 1024 and 2048 rows
    assert metric.real[0].untyped_storage().nbytes() <= 2 * FEATURES.nbytes


def test_what_was_handed_in_is_neither_kept_nor_changed() -> None:
    mine = FEATURES[:5].clone()
    metric = ManifoldScores(4)
    metric.update(mine, real=True)
    metric.update(FEATURES[5:9], real=True)
    assert torch.equal(mine, FEATURES[:5])
    mine.zero_()
    assert torch.equal(metric.real[0], FEATURES[:9])


@pytest.mark.parametrize("copied", [ManifoldScores.clone, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_and_its_original_grow_apart(copied) -> None:
    metric = _fed([1000, 2000])
    copy = copied(metric)
    copy.update(FEATURES[:2], real=True)
    metric.update(FEATURES[2:3], real=True)
    assert torch.equal(metric.real[0], torch.cat([FEATURES, FEATURES[2:3]]))
    assert torch.equal(copy.real[0], torch.cat([FEATURES, FEATURES[:2]]))


def test_too_few_images_over_all_ranks_are_refused_too() -> None:
    metric = ManifoldScores(4)
    metric.update(FEATURES, real=True)
    metric.update(FEATURES[:1], real=False)

    def twice(state: Tensor, group: object = None) -> list[Tensor]:
        return [state, state]

    metric.sync(dist_sync_fn=twice, distributed_available=lambda: True)
    with pytest.raises(InvDiffError, match="at least 4 generated images, found 2"):
        metric.sets(4, "this test needs")
    metric.unsync()
    metric.update(FEATURES[1:4], real=False)
    assert torch.equal(metric.generated[0], FEATURES[:4])
