"""Counting the floating-point operations of a call, with PyTorch's counter."""

from collections.abc import Callable
from contextlib import nullcontext

from torch.utils.flop_counter import FlopCounterMode


class _OneModule(nullcontext[None]):
    """Replaces the counter's tracker of modules, whose totals are not needed.

    The tracker hooks the arguments of modules, and ``torch.autograd.grad`` refuses a hook on a
    parameter that is an argument of a module, as in transformers like PixArt's.
    """

    parents = frozenset({"Global"})


def count_operations(run: Callable[[], object]) -> int:
    """Count the operations of matrix products, convolutions and attention, forward and backward.

    A multiplication and an addition count as two. On the meta device counting costs nothing.

    Args:
        run: function to call once.

    Example:
        >>> import torch
        >>> count_operations(lambda: torch.ones(2, 3) @ torch.ones(3, 4))
        48
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _OneModule()  # type: ignore[assignment]
    with counter:
        run()
    return int(counter.get_total_flops())
