"""Linear layers whose formula an op computes, unless a layer is more than its formula."""

import torch
from torch import nn

from mmvmamba.ops import linear


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a linear layer is no more than its formula.

    It is more for another class, such as an adapted layer, for a weight that is not an ordinary parameter, such as a
    quantised one, where somebody has replaced its forward, and where a hook waits for the call.
    """
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and 'forward' not in layer.__dict__
        and not (layer._forward_pre_hooks or layer._forward_hooks)
        and not (layer._backward_pre_hooks or layer._backward_hooks)
    )


def project(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Call a linear layer, (..., C) to (..., C_out)."""
    return linear(x, layer.weight) if is_plain(layer) and layer.bias is None else layer(x)
