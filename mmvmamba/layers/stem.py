"""The stem: image to map at a quarter of the resolution."""

from torch import nn

from .conv_norm import ConvNorms
from .norm import build_norm


def build_stem(stem: str, in_channels: int, channels: int, norm_layer: str) -> ConvNorms:
    """Build the stem, (B, in_channels, H, W) to (B, channels, H / 4, W / 4).

    Places in the Sequential are the published keys; an Identity holds the place of a published change of layout.

    Args:
        stem (str): ``patch4``, one 4x4 convolution of stride 4 (H // 4), or ``conv3x2``, two 3x3 convolutions of
            stride 2 (ceil(H / 4)).
        in_channels (int): Channels of the image.
        channels (int): Channels of the map, even for ``conv3x2``.
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``.
    """
    if stem == 'patch4':
        return ConvNorms(
            nn.Conv2d(in_channels, channels, kernel_size=4, stride=4),
            nn.Identity(),
            build_norm(norm_layer, channels),
        )
    return ConvNorms(
        nn.Conv2d(in_channels, channels // 2, kernel_size=3, stride=2, padding=1),
        nn.Identity(),
        build_norm(norm_layer, channels // 2, autocast_output=True),
        nn.Identity(),
        nn.GELU(),
        nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1),
        nn.Identity(),
        build_norm(norm_layer, channels),
    )
