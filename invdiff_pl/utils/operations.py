"""Floating-point operations of a call, as PyTorch counts them."""

from collections.abc import Callable
from contextlib import nullcontext

from torch.utils.flop_counter import FlopCounterMode


class _OneModule(nullcontext[None]):
    """In place of the counter's tracker of modules, whose totals are not asked for.

    The tracker hooks what modules are called with, and ``torch.autograd.grad`` refuses a hook on
    a parameter that is an argument of a module, as in transformers of PixArt's form.
    """

    parents = frozenset({"Global"})


def count_operations(run: Callable[[], object]) -> int:
    """Operations of matrix products, convolutions and attention in one call, forward and backward.

    A multiplication and an addition count as two. On the meta device they cost nothing to count.

    Args:
        run: called once.

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
