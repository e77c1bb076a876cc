"""Normalisation layers of maps (B, C, H, W)."""

from typing import Optional

import torch
from torch import nn

from mmvmamba.ops import add_layer_norm, layer_norm
from mmvmamba.ops.checks import autocast_enabled, state_dtype

from .fusion import fusible, run_last, to_first, to_last


@fusible
class LayerNorm(nn.LayerNorm):
    """Layer normalisation of the channels of each pixel, (B, C, H, W) to (B, C, H, W).

    Args:
        channels (int): C.
        autocast_output (bool): Under autocast, whether to give autocast's dtype instead of float32: for a norm whose
            only reader, a Linear, would round its input to that dtype anyway. Default: False.
    """

    def __init__(self, channels: int, autocast_output: bool = False):
        super().__init__(channels)
        self.autocast_output = autocast_output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return to_first(self.channel_last(x.permute(0, 2, 3, 1)))

    def channel_last(self, x: torch.Tensor, shift: Optional[torch.Tensor] = None, gelu: bool = False) -> torch.Tensor:
        """Normalise a channel-last map, or what lies between a convolution and a GELU.

        Args:
            x (Tensor): (B, H, W, C).
            shift (Tensor, optional): (C,), the bias of the convolution before, added to ``x``. Default: None.
            gelu (bool): Whether to apply GELU to the normalised map. Default: False.

        Returns:
            Tensor: (B, H, W, C).
        """
        return layer_norm(x, *self._affine(x), self.eps, self._out_dtype(x), shift, gelu)

    def of_sum(self, x: torch.Tensor, branch: torch.Tensor, factors: Optional[torch.Tensor] = None) -> tuple:
        """Normalise the sum of ``x`` and a residual branch.

        Args:
            x (Tensor): (B, H, W, C).
            branch (Tensor): (B, H, W, C).
            factors (Tensor, optional): (B,), what the branch is multiplied by. Default: 1.

        Returns:
            tuple[Tensor]: The sum and its normalised map, both (B, H, W, C).
        """
        return add_layer_norm(x, branch, *self._affine(x), self.eps, self._out_dtype(x), factors)

    def _affine(self, x) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias; 1 and 0 where somebody took them away."""
        weight, bias = self.weight, self.bias
        if weight is None:
            weight = x.new_ones(x.shape[-1:], dtype=state_dtype(x.dtype) if bias is None else bias.dtype)
        return weight, weight.new_zeros(weight.shape) if bias is None else bias

    def _out_dtype(self, x):
        device = x.device.type
        if x.dtype == torch.float64 or not autocast_enabled(device):
            return x.dtype
        return torch.get_autocast_dtype(device) if self.autocast_output else torch.float32


def normalise(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a norm, or what somebody has put in its place, on a map (B, C, H, W); see :func:`.fusion.run_last`."""
    return to_first(run_last(norm, to_last(x), LayerNorm))


class SpatialSoftmax(nn.Module):
    """Softmax over the pixels of each channel, (B, C, H, W) to (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        return to_first(x.flatten(1, 2).softmax(dim=1).view_as(x))


def build_norm(norm_layer: str, channels: int, autocast_output: bool = False) -> nn.Module:
    """Build a norm: ``ln`` and ``ln2d`` are one layer here, since every map is (B, C, H, W).

    Args:
        norm_layer (str): ``ln``, ``ln2d`` or ``bn``.
        channels (int): Channels of the map.
        autocast_output (bool): See :class:`LayerNorm`. Default: False.
    """
    return nn.BatchNorm2d(channels) if norm_layer == 'bn' else LayerNorm(channels, autocast_output)
