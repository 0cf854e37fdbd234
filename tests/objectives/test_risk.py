"""The objectives against autograd on their definitions, and across cuts of the batch."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from child_processes import run_ranks
from torch import Tensor, nn

from invdiff_pl.objectives import Rule, build_rule, group_objective, group_sums

PENALTY = 3.0
GROUPS = 3
STEP = 0.5
Risks = Callable[[Tensor, Tensor], Tensor]
# What METHOD and the papers write, of risks and group weights; autograd differentiates it.
DEFINITIONS: dict[str, Risks] = {
    "variance": lambda risks, group_weights: risks.mean() + PENALTY * risks.var(unbiased=True),
    "population_variance": lambda r, m: r.mean() + PENALTY * r.var(unbiased=False),
    # Weights updated by this batch's risks, then held fixed (Sagawa et al., algorithm 1).
    "group_dro": lambda r, m: (r * _dro_weights(r.detach())).sum(),
    "reweighting": lambda risks, group_weights: risks.mean(),
    "empirical_risk": lambda risks, group_weights: (
        (risks * group_weights).sum() / group_weights.sum()
    ),
}
NAMES = list(DEFINITIONS)


def _dro_weights(risks: Tensor) -> Tensor:
    weights = torch.full_like(risks, 1 / GROUPS) * torch.exp(STEP * risks)
    return weights / weights.sum()


def _rule(name: str) -> Rule:
    settings = {"step_size": STEP} if name == "group_dro" else {}
    return build_rule(name, GROUPS, PENALTY, **settings)


def _case(soft: bool = True) -> tuple[Tensor, Tensor, nn.Linear]:
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 5, generator=source, dtype=torch.float64)
    weights = torch.rand(64, GROUPS, generator=source, dtype=torch.float64)
    weights = weights / weights.sum(1, keepdim=True)
    if not soft:
        weights = nn.functional.one_hot(weights.argmax(1), GROUPS).double()
    network = nn.Linear(5, 1, bias=False).double()
    nn.init.constant_(network.weight, 0.3)
    return inputs, weights, network


def _losses(network: nn.Linear, inputs: Tensor) -> Tensor:
    return (network(inputs).squeeze(1) - 1).square()


def _defined_gradient(name: str, soft: bool) -> Tensor:
    """Autograd through the definition, on the whole batch."""
    inputs, weights, network = _case(soft)
    losses = _losses(network, inputs)
    group_weights = weights.sum(0)
    risks = (weights * losses[:, None]).sum(0) / group_weights
    DEFINITIONS[name](risks, group_weights).backward()
    assert network.weight.grad is not None
    return network.weight.grad


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_one_batch_of_64_has_the_gradient_of_the_definition(name: str, soft: bool) -> None:
    inputs, weights, network = _case(soft)
    group_objective(_losses(network, inputs), weights, _rule(name)).loss.backward()
    torch.testing.assert_close(network.weight.grad, _defined_gradient(name, soft))


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_two_accumulated_batches_of_32_give_the_gradient_of_64(name: str, soft: bool) -> None:
    inputs, weights, network = _case(soft)
    rule = _rule(name)
    with torch.no_grad():
        sums = group_sums(_losses(network, inputs), weights)
    for half in (slice(0, 32), slice(32, 64)):
        losses = _losses(network, inputs[half])
        group_objective(losses, weights[half], rule, sums=sums).loss.backward()
    expected = _defined_gradient(name, soft)
    torch.testing.assert_close(network.weight.grad, expected, rtol=1e-5, atol=1e-5)


def _rank_gradients(rank: int, store: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gradients = {}
    # 32 and 32; and uneven shares, where a mean of per-rank means would be wrong.
    for cut in (32, 20):
        mine = slice(0, cut) if rank == 0 else slice(cut, 64)
        for name in NAMES:
            for soft in (True, False):
                gradients[f"{name} {soft} {cut}"] = _rank_gradient(name, soft, mine)
    if rank == 0:
        torch.save(gradients, result)
    dist.destroy_process_group()


def _rank_gradient(name: str, soft: bool, mine: slice) -> Tensor:
    inputs, weights, network = _case(soft)

    def add_up(sums: Tensor) -> Tensor:
        dist.all_reduce(sums)
        return sums

    losses = _losses(network, inputs[mine])
    group_objective(losses, weights[mine], _rule(name), reduce=add_up, world_size=2).loss.backward()
    gradient = network.weight.grad
    assert gradient is not None
    dist.all_reduce(gradient)
    return gradient / 2  # as DDP averages


def test_two_ranks_of_32_or_uneven_ones_give_the_gradient_of_64(tmp_path) -> None:
    result = tmp_path / "gradients.pt"
    run_ranks(_rank_gradients, 2, str(tmp_path / "store"), str(result))
    gradients = torch.load(result, weights_only=True)
    assert len(gradients) == 4 * len(NAMES)
    for case, gradient in gradients.items():
        name, soft, _ = case.split()
        expected = _defined_gradient(name, soft == "True")
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5, msg=case)


def test_risks_mean_and_sample_variance_of_a_case_by_hand() -> None:
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0])
    weights = nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), 2).float()
    objective = group_objective(losses, weights, build_rule("variance", 2, PENALTY))
    assert objective.risks.tolist() == [2.0, 6.0]
    assert objective.mean.item() == 4.0
    assert objective.variance.item() == 8.0


def test_values_are_those_of_the_definitions() -> None:
    risks, group_weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([4.0, 2.0, 2.0])
    values = {name: _rule(name).value(risks, group_weights).item() for name in NAMES}
    assert values == pytest.approx(
        {
            "variance": 3 + PENALTY * 7,
            "population_variance": 3 + PENALTY * 14 / 3,
            "group_dro": 6.0,
            "reweighting": 3.0,
            "empirical_risk": 2.5,
        }
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_group_counts_for_nothing(name: str) -> None:
    losses = torch.tensor([1.0, 3.0], requires_grad=True)
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    objective = group_objective(losses, weights, _rule(name))
    assert objective.mean.item() == 2.0
    assert objective.variance.item() == 2.0
    objective.loss.backward()
    expected = {
        # d/dl of (l1 + l2)/2 + 3 (l1 - l2)^2 / 2, and with the population variance half of it.
        "variance": [0.5 - 6.0, 0.5 + 6.0],
        "population_variance": [0.5 - 3.0, 0.5 + 3.0],
        "group_dro": torch.tensor([STEP, 3 * STEP]).softmax(0).tolist(),
        "reweighting": [0.5, 0.5],
        "empirical_risk": [0.5, 0.5],
    }
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx(expected[name])


def test_one_group_has_no_penalty() -> None:
    losses = torch.tensor([1.0, 3.0], requires_grad=True)
    objective = group_objective(losses, torch.ones(2, 1), build_rule("variance", 1, PENALTY))
    assert objective.variance.item() == 0.0
    objective.loss.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0.5, 0.5]))


def test_group_dro_comes_to_weigh_the_group_that_stays_worst() -> None:
    rule = build_rule("group_dro", 2, 0.0, step_size=1.0)
    risks, group_weights = torch.tensor([1.0, 2.0]), torch.ones(2)
    for _ in range(3):
        rule.observe(risks, group_weights)
    # exp(3 * 2 + 2) against exp(3 * 1 + 1): this batch's risks count already.
    expected = torch.tensor([4.0, 8.0]).softmax(0)
    torch.testing.assert_close(rule.gradient(risks, group_weights), expected)


def test_unknown_names_settings_and_a_negative_penalty_are_refused() -> None:
    from invdiff_pl.utils.errors import InvDiffError

    with pytest.raises(InvDiffError, match=r"objective=varianc: expected one of variance"):
        build_rule("varianc", 2, 1.0)
    with pytest.raises(InvDiffError, match="step_size"):
        build_rule("variance", 2, 1.0, step_size=1.0)
    with pytest.raises(InvDiffError, match="lambda_=-1"):
        build_rule("variance", 2, -1.0)
