"""How frozen weights are held: dtypes, and eight or four bits through bitsandbytes."""

from typing import Any

import torch
from torch import nn

QUANTIZED = ("int8", "nf4")


def dtype_of(weights: str) -> torch.dtype:
    """Return the dtype of whatever is not quantised when weights are held in this way."""
    dtype: torch.dtype = torch.bfloat16 if weights in QUANTIZED else getattr(torch, weights)
    return dtype


def quantize(network: nn.Module, weights: str) -> None:
    """Quantise a frozen network's linear layers in place; all other layers stay as they are.

    Gradients run through them as before, so that low-rank updates beside them can be trained
    (Dettmers et al., arXiv 2305.14314).

    Args:
        network: a network on the CPU, in bfloat16.
        weights: ``int8``, one byte per weight (Dettmers et al., arXiv 2208.07339), or ``nf4``, half
            a byte.
    """
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, _quantized(layer, weights))


def _quantized(layer: nn.Linear, weights: str) -> nn.Module:
    from bitsandbytes import nn as bits  # noqa: PLC0415 - an optional dependency

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    made: Any
    if weights == "int8":
        made = bits.Linear8bitLt(*sizes, has_fp16_weights=False)
        made.weight = bits.Int8Params(layer.weight.data, requires_grad=False)
    else:
        made = bits.Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4")
        made.weight = bits.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", module=made
        )
        # On some CPUs the first pass would lay weights out anew, which fails for small layers.
        made.support_avx512bf16_for_cpu = False
    made.bias = layer.bias
    rounded: nn.Module = made.to(layer.weight.device)  # rounds the weights
    return rounded


def is_quantized(network: nn.Module) -> bool:
    """Return whether a network holds weights that are not floating-point numbers."""
    return not all(value.is_floating_point() for value in network.parameters())


def weight_count(value: nn.Parameter) -> int:
    """Count a parameter's weights, two of which share a byte if they have four bits."""
    state = getattr(value, "quant_state", None)
    return value.numel() if state is None else int(state.shape.numel())
