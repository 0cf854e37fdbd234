"""Operations of a call, against counts by hand."""

import torch
from torch import nn

from invdiff_pl.utils.operations import count_operations


def test_operations_are_counted_as_by_hand_also_backwards() -> None:
    linear = nn.Linear(5, 7, bias=False)
    given = torch.zeros(3, 5)
    assert count_operations(lambda: linear(given)) == 2 * 3 * 5 * 7
    # Backwards only what the weights need: the input asks for no gradient.
    assert count_operations(lambda: linear(given).sum().backward()) == 2 * (2 * 3 * 5 * 7)
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    picture = torch.zeros(2, 3, 8, 8)
    assert count_operations(lambda: convolution(picture)) == 2 * 2 * 8 * 8 * 4 * 3 * 9


def test_a_parameter_may_be_an_argument_of_a_module_that_is_differentiated() -> None:
    class Scale(nn.Module):
        def forward(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return values @ scale

    module, scale = Scale(), nn.Parameter(torch.ones(5, 7))

    def run() -> None:
        torch.autograd.grad(module(torch.zeros(3, 5), scale).sum(), [scale])

    assert count_operations(run) == 2 * (2 * 3 * 5 * 7)
