"""Linear layers whose formula an op computes, unless a layer is more than its formula."""

import torch
from torch import nn

from mmvmamba.ops import linear


def is_plain(*layers: nn.Module) -> bool:
    """Whether calling the layers is no more than their formula.

    It is more for another class, such as a quantised or an adapted layer, and where a hook waits for the call.
    """
    return all(
        type(layer) in (nn.Linear, nn.GELU)
        and not (layer._forward_pre_hooks or layer._forward_hooks)
        and not (layer._backward_pre_hooks or layer._backward_hooks)
        for layer in layers
    )


def project(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Call a linear layer without bias, (..., C) to (..., C_out)."""
    return linear(x, layer.weight) if is_plain(layer) else layer(x)
