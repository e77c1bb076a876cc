"""The depthwise convolution and SiLU by torch's own layers."""

import torch
import torch.nn.functional as F


def depthwise_conv_silu(x: torch.Tensor, weight: torch.Tensor, bias) -> torch.Tensor:
    """Convolve and activate; arguments as in :func:`mmvmamba.ops.depthwise_conv_silu`, ``x`` in the output's dtype."""
    dtype = x.dtype
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        padding=int(weight.shape[-1]) // 2,
        groups=int(x.shape[-1]),
    )
    return F.silu(y).permute(0, 2, 3, 1).to(dtype)
