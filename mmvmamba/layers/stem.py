"""The stem: image to channel-last map at a quarter of the resolution."""

import torch
from torch import nn

from .conv_norm import ConvNorms
from .convolution import ConvChannelLast
from .norm import build_norm


class Stem(ConvNorms):
    """Convolutions and norms on channel-last maps, after an image: (B, in_channels, H, W) to (B, H', W', channels)."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image.permute(0, 2, 3, 1))


def build_stem(stem: str, in_channels: int, channels: int, norm_layer: str) -> Stem:
    """Build the stem, (B, in_channels, H, W) to (B, H / 4, W / 4, channels).

    Places in the Sequential are the published keys; an Identity holds the place of a published change of layout.

    Args:
        stem (str): ``patch4``, one 4x4 convolution of stride 4 (H // 4), or ``conv3x2``, two 3x3 convolutions of
            stride 2 (ceil(H / 4)).
        in_channels (int): Channels of the image.
        channels (int): Channels of the map, even for ``conv3x2``.
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``.
    """
    if stem == 'patch4':
        return Stem(
            ConvChannelLast(in_channels, channels, kernel_size=4, stride=4),
            nn.Identity(),
            build_norm(norm_layer, channels),
        )
    return Stem(
        ConvChannelLast(in_channels, channels // 2, kernel_size=3, stride=2, padding=1),
        nn.Identity(),
        build_norm(norm_layer, channels // 2, autocast_output=True),
        nn.Identity(),
        nn.GELU(),
        ConvChannelLast(channels // 2, channels, kernel_size=3, stride=2, padding=1),
        nn.Identity(),
        build_norm(norm_layer, channels),
    )
