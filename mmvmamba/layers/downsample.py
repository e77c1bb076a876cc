"""Between two stages: half the resolution, the next stage's channels."""

import torch
import torch.nn.functional as F
from torch import nn

from .conv_norm import ConvNorms
from .convolution import PadShortSides
from .fusion import run_last, to_first, to_last
from .linear import project
from .norm import LayerNorm, build_norm


class PatchMerging(nn.Module):
    """Concatenate 2x2 pixels, normalise and project, (B, C, H, W) to (B, C_out, ceil(H / 2), ceil(W / 2)).

    The norm sees (B, 4 C, ceil(H / 2), ceil(W / 2)), the linear layer the same with channels last.
    """

    def __init__(self, channels: int, out_channels: int, norm_layer: str):
        super().__init__()
        self.reduction = nn.Linear(4 * channels, out_channels, bias=False)
        self.norm = build_norm(norm_layer, 4 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = to_last(x)
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # down, then right: the order of the published weights
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return to_first(project(self.reduction, run_last(self.norm, torch.cat(quarters, dim=-1), LayerNorm)))


class StridedConv(ConvNorms):
    """A convolution of stride 2, or 1, and its norm, (B, C, H, W) to (B, C_out, H', W')."""


def build_downsample(downsample: str, channels: int, out_channels: int, norm_layer: str, stride: int = 2) -> nn.Module:
    """Build the layer between two stages, (B, channels, H, W) to (B, out_channels, H', W').

    Places in the Sequential are the published keys; those of the published changes of layout have no parameters.

    Args:
        downsample (str): ``merge`` (patch merging), ``conv2`` (2x2 convolution of stride 2) or ``conv3`` (3x3, stride
            2, padding 1), or ``none``, an Identity: resolution and channels stay.
        channels (int): Channels in.
        out_channels (int): Channels out.
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``.
        stride (int): 1 for a map that keeps its resolution, with the weights of a stride of 2; ``conv3`` alone can do
            that. Default: 2.

    Raises:
        ValueError: If another kind has a stride of 1.
    """
    if stride != 2 and downsample != 'conv3':
        raise ValueError(f"strides ask for a stride of {stride}, which downsample {downsample!r} cannot; 'conv3' can")
    if downsample == 'none':
        return nn.Identity()
    if downsample == 'merge':
        return PatchMerging(channels, out_channels, norm_layer)
    place: nn.Module
    if downsample == 'conv2':
        place, conv = PadShortSides(), nn.Conv2d(channels, out_channels, kernel_size=2, stride=2)
    else:
        place, conv = nn.Identity(), nn.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=1)
    return StridedConv(place, conv, nn.Identity(), build_norm(norm_layer, out_channels))
