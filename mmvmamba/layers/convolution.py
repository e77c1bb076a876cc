"""Convolutions that the ops compute where they are torch's own and nothing more."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmvmamba.ops import conv2d_channel_last
from mmvmamba.ops.checks import autocast_enabled

from .fusion import is_plain


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a convolution or Linear of ``x`` has: autocast's, or that of ``x``."""
    device = x.device.type
    enabled = autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if enabled else x.dtype


def is_plain_conv(conv: Any) -> bool:
    """Whether :func:`mmvmamba.ops.conv2d_channel_last` computes a convolution."""
    return (
        is_plain(conv, nn.Conv2d)
        and _is_square(conv)
        and conv.groups == 1
        and conv.stride[0] == conv.stride[1]
        and conv.padding[0] == conv.padding[1]
    )


def is_plain_depthwise(conv: Any) -> bool:
    """Whether :func:`mmvmamba.ops.depthwise_conv_silu` computes a convolution, but for its activation."""
    return (
        is_plain(conv, nn.Conv2d)
        and _is_square(conv)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size[0] % 2 == 1
        and conv.padding[0] == conv.padding[1] == conv.kernel_size[0] // 2
        and conv.stride == (1, 1)
    )


def _is_square(conv: Any) -> bool:
    return (
        conv.kernel_size[0] == conv.kernel_size[1]
        and conv.dilation == (1, 1)
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
    )


def convolve(conv: Any, x: torch.Tensor, add_bias: bool = True) -> torch.Tensor:
    """A plain convolution of a channel-last map, (B, H, W, C_in) to (B, H', W', C_out), with or without its bias."""
    bias = conv.bias if add_bias else None
    return conv2d_channel_last(x, conv.weight, bias, conv.stride[0], conv.padding[0], autocast_dtype(x))


class PadShortSides(nn.Module):
    """Pad a side of one pixel, too short for a 2x2 convolution, to two: to (B, C, max(H, 2), max(W, 2))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        if height > 1 and width > 1:
            return x
        return F.pad(x, (0, max(0, 2 - width), 0, max(0, 2 - height)))
