"""The convolution of channel-last maps by torch's own."""

import torch
import torch.nn.functional as F


def conv2d_channel_last(x: torch.Tensor, weight: torch.Tensor, bias, stride: int, padding: int) -> torch.Tensor:
    """Convolve; arguments as in :func:`mmvmamba.ops.conv2d_channel_last`, ``x`` in the output's dtype."""
    dtype = x.dtype
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(dtype), bias, stride, padding)
    return y.permute(0, 2, 3, 1).to(dtype)
