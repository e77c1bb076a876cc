"""The stem: image to channel-last map at a quarter of the resolution."""

import torch
from torch import nn

from .norm import build_norm


class Permute(nn.Module):
    """Permute dimensions: in the Sequentials below it marks where the layout changes."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(*self.dims)

    def extra_repr(self) -> str:
        return str(self.dims)


def to_channel_last() -> Permute:
    """(B, C, H, W) to (B, H, W, C)."""
    return Permute(0, 2, 3, 1)


def to_channel_first() -> Permute:
    """(B, H, W, C) to (B, C, H, W)."""
    return Permute(0, 3, 1, 2)


def build_stem(stem: str, in_channels: int, channels: int, norm_layer: str) -> nn.Sequential:
    """Build the stem, (B, in_channels, H, W) to (B, H / 4, W / 4, channels); places are the published keys.

    Args:
        stem (str): ``patch4``, one 4x4 convolution of stride 4 (H // 4), or ``conv3x2``, two 3x3 convolutions of
            stride 2 (ceil(H / 4)).
        in_channels (int): Channels of the image.
        channels (int): Channels of the map, even for ``conv3x2``.
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``.
    """
    if stem == 'patch4':
        return nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=4, stride=4),
            to_channel_last(),
            build_norm(norm_layer, channels),
        )
    return nn.Sequential(
        nn.Conv2d(in_channels, channels // 2, kernel_size=3, stride=2, padding=1),
        to_channel_last(),
        build_norm(norm_layer, channels // 2),
        to_channel_first(),
        nn.GELU(),
        nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1),
        to_channel_last(),
        build_norm(norm_layer, channels),
    )
