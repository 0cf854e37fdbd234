"""Batches: balance, pairing, and independence of interruptions and ranks."""

import dataclasses

import pytest
import torch

from invdiff_pl.data.batches import BatchPlan, PairedEnvironmentBatches, ShuffledBatches
from invdiff_pl.utils.errors import InvDiffError

# 100 images of two prompts; environment 1 has three images of prompt 0 and none of prompt 1.
PROMPTS = torch.tensor([0] * 60 + [1] * 40)
ENVIRONMENTS = torch.tensor([0] * 57 + [1] * 3 + [0] * 40)
MEMBERSHIPS = torch.nn.functional.one_hot(ENVIRONMENTS, 2).float()
PLAN = BatchPlan(batch_size=24, seed=0, first=0, last=40)


def _rows(sampler) -> list[list[int]]:
    return [selection.rows.tolist() for selection in sampler]


def test_every_image_comes_once_an_epoch() -> None:
    plan = BatchPlan(batch_size=10, seed=0, first=0, last=10)
    seen = torch.cat([selection.rows for selection in ShuffledBatches(100, plan)])
    assert sorted(seen.tolist()) == list(range(100))


def test_epochs_have_different_orders() -> None:
    plan = BatchPlan(batch_size=100, seed=0, first=0, last=2)
    first, second = _rows(ShuffledBatches(100, plan))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("paired", [True, False])
def test_a_resumed_sampler_goes_on_with_the_same_batches(paired: bool) -> None:
    def sampler(plan: BatchPlan) -> PairedEnvironmentBatches | ShuffledBatches:
        if paired:
            return PairedEnvironmentBatches(PROMPTS, MEMBERSHIPS, plan)
        return ShuffledBatches(100, plan)

    resumed = sampler(dataclasses.replace(PLAN, first=17))
    assert _rows(resumed) == _rows(sampler(PLAN))[17:]
    assert len(resumed) == len(sampler(PLAN))


@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 1), (3, 1), (1, 2), (2, 3)])
def test_shares_of_ranks_and_micro_batches_add_up_to_the_global_batch(
    world_size: int, micro_batches: int
) -> None:
    whole = next(iter(PairedEnvironmentBatches(PROMPTS, MEMBERSHIPS, PLAN)))
    rows, draws = [], []
    for micro_batch in range(micro_batches):
        for rank in range(world_size):
            plan = BatchPlan(
                batch_size=24,
                seed=0,
                first=micro_batch,
                last=micro_batches,
                micro_batches=micro_batches,
                rank=rank,
                world_size=world_size,
            )
            share = next(iter(PairedEnvironmentBatches(PROMPTS, MEMBERSHIPS, plan)))
            rows.append(share.rows)
            draws.append(share.draws)
    assert torch.cat(rows).tolist() == whole.rows.tolist()
    assert torch.cat(draws).tolist() == whole.draws.tolist()


def test_the_images_of_a_pair_share_prompt_and_draw_but_not_environment() -> None:
    for selection in PairedEnvironmentBatches(PROMPTS, MEMBERSHIPS, PLAN):
        prompts = PROMPTS[selection.rows].reshape(-1, 2)
        draws = selection.draws.reshape(-1, 2)
        environments = ENVIRONMENTS[selection.rows].reshape(-1, 2)
        assert (prompts[:, 0] == prompts[:, 1]).all()
        assert (draws[:, 0] == draws[:, 1]).all()
        complete = prompts[:, 0] == 0
        assert (environments[complete] == torch.tensor([0, 1])).all()


def test_an_environment_of_three_images_is_drawn_as_often_as_the_other() -> None:
    rows = torch.cat(
        [selection.rows for selection in PairedEnvironmentBatches(PROMPTS, MEMBERSHIPS, PLAN)]
    )
    of_first_prompt = rows[PROMPTS[rows] == 0]
    assert ENVIRONMENTS[of_first_prompt].double().mean().item() == 0.5
    assert set(of_first_prompt[ENVIRONMENTS[of_first_prompt] == 1].tolist()) == {57, 58, 59}


def test_prompts_are_balanced_in_every_batch() -> None:
    for selection in PairedEnvironmentBatches(PROMPTS, MEMBERSHIPS, PLAN):
        assert PROMPTS[selection.rows].double().mean().item() == 0.5


def test_a_missing_environment_is_filled_by_the_prompts_own_images() -> None:
    for selection in PairedEnvironmentBatches(PROMPTS, MEMBERSHIPS, PLAN):
        second = PROMPTS[selection.rows] == 1
        assert (ENVIRONMENTS[selection.rows[second]] == 0).all()
        assert selection.environments is not None
        assert (selection.environments == ENVIRONMENTS[selection.rows]).all()


def test_rows_without_membership_are_never_drawn() -> None:
    memberships = MEMBERSHIPS.clone()
    memberships[:50] = 0
    memberships[58] = 0
    rows = torch.cat(
        [selection.rows for selection in PairedEnvironmentBatches(PROMPTS, memberships, PLAN)]
    )
    assert not ((rows < 50) | (rows == 58)).any()
    assert set(rows.tolist()) >= {57 - 1, 57, 59}


def test_soft_members_are_drawn_in_proportion_to_their_membership() -> None:
    shares = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    plan = BatchPlan(batch_size=2000, seed=0, first=0, last=5)
    counts = torch.zeros(2, 3)
    for selection in PairedEnvironmentBatches(torch.zeros(3, dtype=torch.int64), shares, plan):
        assert selection.environments is not None
        for environment in (0, 1):
            rows = selection.rows[selection.environments == environment]
            counts[environment] += rows.bincount(minlength=3)
    expected = (shares / shares.sum(0)).T
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), expected, rtol=0, atol=0.02)


def test_unpaired_images_each_have_a_draw_of_their_own() -> None:
    sampler = PairedEnvironmentBatches(PROMPTS, MEMBERSHIPS, PLAN, paired=False)
    paired = PairedEnvironmentBatches(PROMPTS, MEMBERSHIPS, PLAN)
    for selection, other in zip(sampler, paired, strict=True):
        assert selection.draws.tolist() == list(range(24))
        assert selection.rows.tolist() == other.rows.tolist()


def test_shuffled_batches_of_some_rows_hold_no_others() -> None:
    rows = torch.tensor([3, 5, 8, 13])
    plan = BatchPlan(batch_size=4, seed=0, first=0, last=3)
    for selection in ShuffledBatches(rows, plan):
        assert sorted(selection.rows.tolist()) == rows.tolist()


def test_a_batch_too_small_for_the_ranks_is_refused() -> None:
    with pytest.raises(InvDiffError, match=r"^batch_size=2 .* 4"):
        BatchPlan(batch_size=2, seed=0, first=0, last=1, world_size=4)
    with pytest.raises(InvDiffError, match="pairs"):
        PairedEnvironmentBatches(
            PROMPTS, MEMBERSHIPS, BatchPlan(batch_size=4, seed=0, first=0, last=1, world_size=4)
        )
