"""Training an adapter towards the frozen denoiser's prediction where there is little noise.

Write ``a`` for the hidden attribute, ``z`` for noisy latents. The best prediction is

    E[target | z] = sum_a P(a | z) E[target | z, a].

Samples whose shares of ``a`` are even differ from the backbone's in ``P(a | z)`` alone. Where there
is so little noise that ``z`` shows ``a``, this probability is 0 or 1 for both: an adapter that
evens out shares has nothing to change there. Images that the model has drawn itself could only
teach it its own mistakes there, so the frozen prediction is the target instead. (Images of a data
set may show what the model draws badly; they are the better target.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from invdiff_pl.adapters import Adapter
from invdiff_pl.backbones.denoiser import Condition, FrozenDenoiser


class Draw(NamedTuple):
    """What a denoiser is given for a batch, and what it should predict.

    Attributes:
        noisy: noisy latents ``[B, C, H, W]``.
        timesteps: int64 ``[B]``.
        condition: inputs for the prompts, B rows by name.
        target: ``[B, C, H, W]``.
    """

    noisy: Tensor
    timesteps: Tensor
    condition: Condition
    target: Tensor


@torch.no_grad()
def anchored(draw: Draw, frozen: FrozenDenoiser, adapter: Adapter, before: int) -> Draw:
    """Make the frozen denoiser's prediction a draw's target where there is little noise.

    Args:
        draw: a draw of B images.
        frozen: the frozen denoiser.
        adapter: the adapter beside it, at scale 1 before and after.
        before: timestep below which targets are replaced.
    """
    rows = (draw.timesteps < before).nonzero().squeeze(1)
    if not len(rows):
        return draw
    given = draw.noisy[rows], draw.timesteps[rows], {n: v[rows] for n, v in draw.condition.items()}
    with adapter.at_scale(0.0):
        prediction = frozen.predict(*given, adapter.denoiser)
    return draw._replace(target=draw.target.index_copy(0, rows, prediction.to(draw.target.dtype)))
