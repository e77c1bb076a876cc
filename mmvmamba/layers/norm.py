"""Normalisation layers on channel-last maps."""

import torch
from torch import nn


class BatchNormChannelLast(nn.BatchNorm2d):
    """Batch normalisation of a channel-last map, (B, H, W, C) to (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SpatialSoftmax(nn.Module):
    """Softmax over the pixels of each channel, (B, H, W, C) to (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a channel-last map, stride 1, (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, channels: int, kernel_size: int, bias: bool):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def build_norm(norm_layer: str, channels: int) -> nn.Module:
    """Build the block norm: ``ln`` and ``ln2d`` are one layer here, since every map is channel-last inside."""
    return BatchNormChannelLast(channels) if norm_layer == 'bn' else nn.LayerNorm(channels)


def build_out_norm(out_norm: str, channels: int) -> nn.Module:
    """Build the normalisation of the scan's output; the places in a Sequential are the published state-dict keys."""
    if out_norm == 'ln':
        return nn.LayerNorm(channels)
    if out_norm == 'dwconv3':
        return nn.Sequential(nn.Identity(), DepthwiseConv(channels, 3, bias=False))
    if out_norm == 'cnorm':
        return nn.Sequential(nn.LayerNorm(channels), nn.Identity(), DepthwiseConv(channels, 3, bias=False))
    return dict(none=nn.Identity, softmax=SpatialSoftmax, sigmoid=nn.Sigmoid)[out_norm]()
