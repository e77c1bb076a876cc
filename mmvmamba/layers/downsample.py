"""Between two stages: half the resolution, the next stage's channels."""

import torch
import torch.nn.functional as F
from torch import nn

from .conv_norm import ConvNorms
from .convolution import ConvChannelLast
from .linear import project
from .norm import build_norm


class PatchMerging(nn.Module):
    """Concatenate 2x2 pixels, normalise and project, (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), C_out)."""

    def __init__(self, channels: int, out_channels: int, norm_layer: str):
        super().__init__()
        self.reduction = nn.Linear(4 * channels, out_channels, bias=False)
        self.norm = build_norm(norm_layer, 4 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # down, then right: the order of the published weights
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return project(self.reduction, self.norm(torch.cat(quarters, dim=-1)))


class HalvingConv(ConvChannelLast):
    """2x2 convolution of stride 2; a side of one pixel, too short for it, is padded to two."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: torch.Tensor, add_bias: bool = True) -> torch.Tensor:
        height, width = x.shape[1:3]
        return super().forward(F.pad(x, (0, 0, 0, max(0, 2 - width), 0, max(0, 2 - height))), add_bias)


def build_downsample(downsample: str, channels: int, out_channels: int, norm_layer: str) -> nn.Module:
    """Build the layer between two stages, from one channel-last map to the next.

    Places in the Sequential are the published keys; an Identity holds the place of a published change of layout.

    Args:
        downsample (str): ``merge`` (patch merging), ``conv2`` (2x2 convolution of stride 2) or ``conv3`` (3x3, stride
            2, padding 1).
        channels (int): Channels in.
        out_channels (int): Channels out.
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``.
    """
    if downsample == 'merge':
        return PatchMerging(channels, out_channels, norm_layer)
    if downsample == 'conv2':
        conv = HalvingConv(channels, out_channels)
    else:
        conv = ConvChannelLast(channels, out_channels, kernel_size=3, stride=2, padding=1)
    return ConvNorms(nn.Identity(), conv, nn.Identity(), build_norm(norm_layer, out_channels))
