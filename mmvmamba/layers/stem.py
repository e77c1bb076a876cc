"""The stem: image to map, at a quarter of the resolution unless ``patch_size`` says otherwise."""

from typing import Optional

import torch
from torch import nn

from .conv_norm import ConvNorms
from .norm import build_norm


class Stem(ConvNorms):
    """Two convolutions with their norms, whose map between them can be had too: that at half the resolution."""

    BETWEEN = 5  # the place behind the first convolution, its norm and GELU

    def first_half(self, x: torch.Tensor) -> torch.Tensor:
        """The map between, (B, in_channels, H, W) to (B, channels / 2, H / 2, W / 2)."""
        return self.run(x, 0, self.BETWEEN)

    def forward(self, x: torch.Tensor, between: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The stem's map, from the image or, if that is given, from the map between."""
        if between is None:
            return super().forward(x)
        return self.run(between, self.BETWEEN, len(self))


def build_stem(
    stem: str, in_channels: int, channels: int, norm_layer: str, patch_size: int = 4, patch_norm: bool = True
) -> ConvNorms:
    """Build the stem, (B, in_channels, H, W) to (B, channels, h, w) with h and w about H / patch_size, W / patch_size.

    Places in the Sequential are the published keys; an Identity holds the place of a published change of layout, and of
    a norm that is left out.

    Args:
        stem (str): ``patch4``, one convolution of kernel and stride ``patch_size`` (h = H // patch_size), or
            ``conv3x2``, two convolutions of stride s = patch_size / 2, kernel s + 1 and padding 1 (h = ceil(H / 4) for
            a ``patch_size`` of 4).
        in_channels (int): Channels of the image.
        channels (int): Channels of the map, even for ``conv3x2``.
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``.
        patch_size (int): Pixels of the image a side for one of the map, even for ``conv3x2``. Default: 4.
        patch_norm (bool): Whether a norm follows each convolution. Default: True.
    """

    def norm(width: int, **options) -> nn.Module:
        return build_norm(norm_layer, width, **options) if patch_norm else nn.Identity()

    if stem == 'patch4':
        return ConvNorms(
            nn.Conv2d(in_channels, channels, kernel_size=patch_size, stride=patch_size),
            nn.Identity(),
            norm(channels),
        )
    stride = patch_size // 2
    return Stem(
        nn.Conv2d(in_channels, channels // 2, kernel_size=stride + 1, stride=stride, padding=1),
        nn.Identity(),
        norm(channels // 2, autocast_output=True),
        nn.Identity(),
        nn.GELU(),
        nn.Conv2d(channels // 2, channels, kernel_size=stride + 1, stride=stride, padding=1),
        nn.Identity(),
        norm(channels),
    )


def smallest_side(stem: str, patch_size: int) -> int:
    """The shortest side of an image (at least 4) from which :func:`build_stem`'s layers leave a pixel."""
    stride = patch_size // 2
    return max(4, patch_size if stem == 'patch4' else stride * (stride - 1) - 1)
