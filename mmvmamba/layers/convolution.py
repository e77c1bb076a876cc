"""Convolutions on channel-last maps."""

import torch
from torch import nn

from mmvmamba.ops import conv2d_channel_last, depthwise_conv_silu
from mmvmamba.ops.checks import autocast_enabled


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a convolution or Linear of ``x`` has: autocast's, or that of ``x``."""
    device = x.device.type
    enabled = autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if enabled else x.dtype


class ConvChannelLast(nn.Conv2d):
    """Convolution of a channel-last map, (B, H, W, C_in) to (B, H', W', C_out).

    Args:
        in_channels (int): C_in.
        out_channels (int): C_out.
        kernel_size (int): Side of the kernel.
        stride (int): Pixels between two outputs, along both axes.
        padding (int): Zeros around the map. Default: 0.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: torch.Tensor, add_bias: bool = True) -> torch.Tensor:
        """Convolve; without ``add_bias`` the bias is left to the layer that follows."""
        bias = self.bias if add_bias else None
        return conv2d_channel_last(x, self.weight, bias, self.stride[0], self.padding[0], autocast_dtype(x))


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a channel-last map, stride 1, (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, channels: int, kernel_size: int, bias: bool):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: torch.Tensor, silu: bool = False) -> torch.Tensor:
        """Convolve; with ``silu`` apply that activation too, in the same kernel if there is one."""
        if silu:
            return depthwise_conv_silu(x, self.weight, self.bias, autocast_dtype(x))
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
