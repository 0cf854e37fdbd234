"""The invariant objective against autograd on its definition, and across cuts of the batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from invdiff_pl.objectives import group_sums, invariant_objective

PENALTY = 3.0


def _case(count: int = 64, groups: int = 3, soft: bool = True) -> tuple[Tensor, Tensor, nn.Linear]:
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 5, generator=source, dtype=torch.float64)
    weights = torch.rand(count, groups, generator=source, dtype=torch.float64)
    if not soft:
        weights = nn.functional.one_hot(weights.argmax(1), groups).double()
    network = nn.Linear(5, 1, bias=False).double()
    nn.init.constant_(network.weight, 0.3)
    return inputs, weights, network


def _losses(network: nn.Linear, inputs: Tensor) -> Tensor:
    return (network(inputs).squeeze(1) - 1).square()


def _defined_gradient(soft: bool) -> Tensor:
    """Autograd through ``mean_g L_g + lambda Var_g L_g`` as METHOD writes it."""
    inputs, weights, network = _case(soft=soft)
    losses = _losses(network, inputs)
    risks = (weights * losses[:, None]).sum(0) / weights.sum(0)
    (risks.mean() + PENALTY * risks.var(unbiased=True)).backward()
    assert network.weight.grad is not None
    return network.weight.grad


@pytest.mark.parametrize("soft", [True, False])
def test_gradient_is_that_of_mean_plus_variance(soft: bool) -> None:
    inputs, weights, network = _case(soft=soft)
    invariant_objective(_losses(network, inputs), weights, PENALTY).loss.backward()
    torch.testing.assert_close(network.weight.grad, _defined_gradient(soft))


def test_values_are_mean_and_sample_variance_of_group_risks() -> None:
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0])
    weights = nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), 2).float()
    objective = invariant_objective(losses, weights, PENALTY)
    torch.testing.assert_close(objective.risks, torch.tensor([2.0, 6.0]))
    assert objective.mean.item() == 4.0
    assert objective.variance.item() == 8.0


def test_two_accumulated_halves_give_the_gradient_of_the_whole() -> None:
    inputs, weights, network = _case()
    with torch.no_grad():
        sums = group_sums(_losses(network, inputs), weights)
    for half in (slice(0, 32), slice(32, 64)):
        losses = _losses(network, inputs[half])
        invariant_objective(losses, weights[half], PENALTY, sums=sums).loss.backward()
    torch.testing.assert_close(network.weight.grad, _defined_gradient(soft=True))


def _rank_gradient(rank: int, store: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    inputs, weights, network = _case()
    # Uneven shares, so that a mean of per-rank means would be wrong.
    mine = slice(0, 20) if rank == 0 else slice(20, 64)

    def add_up(sums: Tensor) -> Tensor:
        dist.all_reduce(sums)
        return sums

    losses = _losses(network, inputs[mine])
    objective = invariant_objective(losses, weights[mine], PENALTY, reduce=add_up, world_size=2)
    objective.loss.backward()
    gradient = network.weight.grad
    assert gradient is not None
    dist.all_reduce(gradient)
    if rank == 0:
        torch.save(gradient / 2, result)  # as DDP averages
    dist.destroy_process_group()


def test_two_ranks_with_uneven_shares_give_the_gradient_of_one(tmp_path) -> None:
    result = tmp_path / "gradient.pt"
    mp.spawn(_rank_gradient, (str(tmp_path / "store"), str(result)), nprocs=2)
    gradient = torch.load(result, weights_only=True)
    torch.testing.assert_close(gradient, _defined_gradient(soft=True))


def test_an_absent_group_is_left_out_of_mean_and_variance() -> None:
    losses = torch.tensor([1.0, 3.0], requires_grad=True)
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    objective = invariant_objective(losses, weights, PENALTY)
    assert objective.mean.item() == 2.0
    assert objective.variance.item() == 2.0
    assert objective.risks.isnan().tolist() == [False, False, True]
    objective.loss.backward()
    # d/dl of (l1 + l2)/2 + 3 (l1 - l2)^2 / 2
    torch.testing.assert_close(losses.grad, torch.tensor([0.5 - 6.0, 0.5 + 6.0]))


def test_one_group_has_no_penalty() -> None:
    losses = torch.tensor([1.0, 3.0], requires_grad=True)
    objective = invariant_objective(losses, torch.ones(2, 1), PENALTY)
    assert objective.variance.item() == 0.0
    objective.loss.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0.5, 0.5]))
