"""Layers of a LoRA that compute ``(W + B A) x`` in training: one product instead of three.

For a linear layer, no gradient of the whole weight is computed: with ``z = B^T dy`` and
``u = A x``, of r channels each, ``dA = z x^T`` and ``dB = dy u^T``. For a convolution on a CPU it
is computed, since a convolution of few channels takes nearly as long as one of sixteen, and peft's
form needs three of them; on other devices convolutions stay in that form.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F


class _FoldedLinear(torch.autograd.Function):
    """``(W + B A) x + b`` of x ``[..., I]``, A ``[r, I]``, B ``[O, r]``; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        return F.linear(x, torch.addmm(weight, up, down), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        into_x = grad @ torch.addmm(weight, up, down) if ctx.needs_input_grad[0] else None
        rows, out = x.flatten(0, -2), grad.flatten(0, -2)
        # The order matters: few rows are several times as fast as few columns in a product.
        into_down, into_up = (up.T @ out.T) @ rows, ((down @ rows.T) @ out).T
        return into_x, None, None, into_down, into_up


class FoldedLinear(lora.Linear):
    """peft's linear layer, computed folded; see :func:`train_folded`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what peft's layer computes."""
        if (update := _update(self, x)) is None:
            unchanged: Tensor = super().forward(x, *args, **kwargs)
            return unchanged
        base = self.get_base_layer()
        result: Tensor = _FoldedLinear.apply(x, base.weight, base.bias, *update)
        return result


class FoldedConv2d(lora.Conv2d):
    """peft's convolution, computed folded; see :func:`train_folded`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what peft's layer computes."""
        update = _update(self, x) if x.device.type == "cpu" else None
        if update is None:
            unchanged: Tensor = super().forward(x, *args, **kwargs)
            return unchanged
        base, (down, up) = self.get_base_layer(), update
        folded = torch.addmm(base.weight.flatten(1), up.flatten(1), down.flatten(1))
        return F.conv2d(x, folded.view_as(base.weight), base.bias, base.stride, base.padding)


def _update(layer: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return A and the scaled B, if nothing else is to be folded and rounding cannot lose them."""
    if layer.disable_adapters or layer.merged or not torch.is_grad_enabled():
        return None
    names, weight = layer.active_adapters, layer.get_base_layer().weight
    if len(names) != 1 or names[0] not in layer.lora_A:
        return None
    down, up = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    single = all(value.dtype == torch.float32 for value in (x, weight, down, up))
    if not single or torch.is_autocast_enabled(x.device.type):
        return None
    scale = layer.scaling[names[0]]
    return down, up if scale == 1 else scale * up


def train_folded(layer: Any) -> None:
    """Make a LoRA layer compute in the folded form of this module whenever gradients are taken.

    Results are peft's up to rounding. Beside other LoRAs, in half precision, and if the layer is of
    another kind (with dropout, groups, dilation; DoRA), it computes as peft's layer does.

    Args:
        layer: a layer of peft; its class is replaced by one derived from it.
    """
    dropout = any(not isinstance(each, nn.Identity) for each in layer.lora_dropout.values())
    if dropout or layer.lora_variant:
        return
    if type(layer) is lora.Linear:
        layer.__class__ = FoldedLinear
    elif type(layer) is lora.Conv2d and _is_plain(layer.get_base_layer()):
        layer.__class__ = FoldedConv2d


def _is_plain(layer: nn.Conv2d) -> bool:
    return (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
