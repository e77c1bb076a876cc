"""Linear layers whose formula an op computes, unless a layer is more than its formula."""

import torch
from torch import nn

from mmvmamba.ops import linear

from .fusion import is_plain


def project(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Call a linear layer, (..., C) to (..., C_out)."""
    return linear(x, layer.weight) if is_plain(layer, nn.Linear) and layer.bias is None else layer(x)
