"""Two linear layers with a GELU between them by torch's own."""

import torch
import torch.nn.functional as F


def mlp(x: torch.Tensor, weight1: torch.Tensor, bias1, weight2: torch.Tensor, bias2) -> torch.Tensor:
    """Arguments as in :func:`mmvmamba.ops.mlp`."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
