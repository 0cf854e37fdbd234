"""Peaks of memory against numbers counted by hand."""

import torch

from invdiff_pl.callbacks.resource_estimate import PeakMemory, activations


def test_the_peak_is_of_what_lives_at_once() -> None:
    given = torch.zeros(1000)
    with PeakMemory() as memory:
        first = given + 1  # 4000 bytes
        second = first * 2  # 8000 alive
        assert memory.peak == 8000
        del first  # 4000
        third = second.view(10, 100)  # the same storage
        fourth = third.repeat(1, 3)  # 4000 + 12000
        del second, third, fourth
        _ = given.add_(1)  # its own storage
    assert memory.peak == 16000


def test_the_peak_of_a_backward_pass_holds_what_was_saved_and_the_gradients() -> None:
    weights = torch.ones(100, requires_grad=True)
    with PeakMemory() as memory:
        # exp saves its result (400 bytes); the sum and its gradient are 4 each; the gradient of
        # the product is 400 (the sum's gradient is expanded without a copy).
        loss = weights.exp().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.shape == (100,)
    assert memory.peak == 400 + 4 + 4 + 400


def test_activations_grow_in_proportion_to_the_batch() -> None:
    def run(count: int) -> None:
        kept = torch.zeros(25), torch.zeros(count, 100)
        del kept

    assert activations(run, 1) == 100 + 400
    assert activations(run, 8) == 100 + 8 * 400
