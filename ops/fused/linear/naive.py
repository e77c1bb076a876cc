"""A linear layer by torch's own."""

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Arguments as in :func:`mmvmamba.ops.linear`."""
    return F.linear(x, weight)
