"""Normalisation layers on channel-last maps."""

import torch
from torch import nn

from mmvmamba.ops import add_layer_norm, layer_norm
from mmvmamba.ops.checks import autocast_enabled

from .convolution import DepthwiseConv


class LayerNorm(nn.LayerNorm):
    """Layer normalisation of a channel-last map, (..., C) to (..., C).

    Args:
        channels (int): C.
        autocast_output (bool): Under autocast, whether to give autocast's dtype instead of float32: for a norm whose
            only reader, a Linear, would round its input to that dtype anyway. Default: False.
    """

    def __init__(self, channels: int, autocast_output: bool = False):
        super().__init__(channels)
        self.autocast_output = autocast_output

    def forward(
        self,
        x: torch.Tensor,
        branch: torch.Tensor = None,
        factors: torch.Tensor = None,
        shift: torch.Tensor = None,
        gelu: bool = False,
    ):
        """Normalise ``x``, or the sum of ``x`` and a residual branch, or what lies between a convolution and GELU.

        Args:
            x (Tensor): (B, ..., C).
            branch (Tensor, optional): (B, ..., C). Default: None.
            factors (Tensor, optional): (B,), what the branch is multiplied by. Default: 1.
            shift (Tensor, optional): (C,), the bias of the convolution before, added to ``x``. Default: None.
            gelu (bool): Whether to apply GELU to the normalised map. Default: False.

        Returns:
            Tensor | tuple[Tensor]: The normalised map; with a branch, the sum and its normalised map.

        Raises:
            ValueError: If a branch comes together with ``shift`` or ``gelu``.
        """
        out_dtype = self._out_dtype(x)
        if branch is None:
            return layer_norm(x, self.weight, self.bias, self.eps, out_dtype, shift, gelu)
        if shift is not None or gelu:
            raise ValueError('shift and gelu stand between a convolution and its activation, got a branch as well')
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps, out_dtype, factors)

    def _out_dtype(self, x):
        device = x.device.type
        if x.dtype == torch.float64 or not autocast_enabled(device):
            return x.dtype
        return torch.get_autocast_dtype(device) if self.autocast_output else torch.float32


class BatchNormChannelLast(nn.BatchNorm2d):
    """Batch normalisation of a channel-last map, (B, H, W, C) to (B, H, W, C); a branch as in :class:`LayerNorm`."""

    def forward(self, x: torch.Tensor, branch: torch.Tensor = None, factors: torch.Tensor = None):
        if branch is not None:
            x = add_residual(x, branch, factors)
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y if branch is None else (x, y)


def add_residual(x: torch.Tensor, branch: torch.Tensor, factors: torch.Tensor = None) -> torch.Tensor:
    """``x + factors * branch``, maps (B, H, W, C) and factors (B,)."""
    return x + (branch if factors is None else branch * factors.to(branch.dtype).view(-1, 1, 1, 1))


class SpatialSoftmax(nn.Module):
    """Softmax over the pixels of each channel, (B, H, W, C) to (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1, 2).softmax(dim=1).view_as(x)


def build_norm(norm_layer: str, channels: int, autocast_output: bool = False) -> nn.Module:
    """Build a norm: ``ln`` and ``ln2d`` are one layer here, since every map is channel-last inside.

    Args:
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``.
        channels (int): Channels of the map.
        autocast_output (bool): See :class:`LayerNorm`. Default: False.
    """
    return BatchNormChannelLast(channels) if norm_layer == 'bn' else LayerNorm(channels, autocast_output)


def build_out_norm(out_norm: str, channels: int) -> nn.Module:
    """Build the normalisation of the scan's output; the places in a Sequential are the published state-dict keys."""
    if out_norm == 'ln':
        return LayerNorm(channels, autocast_output=True)
    if out_norm == 'dwconv3':
        return nn.Sequential(nn.Identity(), DepthwiseConv(channels, 3, bias=False))
    if out_norm == 'cnorm':
        return nn.Sequential(
            LayerNorm(channels, autocast_output=True), nn.Identity(), DepthwiseConv(channels, 3, bias=False)
        )
    return dict(none=nn.Identity, softmax=SpatialSoftmax, sigmoid=nn.Sigmoid)[out_norm]()
