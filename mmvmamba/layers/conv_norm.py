"""Convolutions with their norms, which run in one pass where they can."""

from typing import Any

import torch
from torch import nn

from mmvmamba.ops.backend import is_watched

from .convolution import convolve, is_plain_conv
from .fusion import is_plain, run_last, to_first, to_last
from .norm import LayerNorm, SpatialSoftmax


class ConvNorms(nn.Sequential):
    """Layers on maps, (B, C, H, W) to (B, C', H', W'), among them convolutions followed by their norms.

    A layer norm applies the GELU that follows it in its own pass, and on a GPU adds the bias of the convolution before
    it.  Where one of the three is not plain, each layer is called by itself.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, 0, len(self))

    def run(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Run the layers from one place to another, maps (B, C, H, W) in and out."""
        x = to_last(x)
        # the published changes of layout, which are parameter-free places here
        layers = [layer for layer in list(self)[start:stop] if not is_plain(layer, nn.Identity)]
        while layers:
            x, taken = _first_layers(x, *(*layers, None, None)[:3])
            layers = layers[taken:]
        return to_first(x)


def _first_layers(x: torch.Tensor, conv: Any, norm: Any, act: Any) -> tuple:
    """Run the first layer of three, or what can be fused of them, and count them."""
    if not is_plain_conv(conv):
        return run_last(conv, x, LayerNorm), 1
    if norm is None or not is_plain(norm, LayerNorm):
        return convolve(conv, x), 1
    gelu = act is not None and is_plain(act, nn.GELU) and act.approximate == 'none'
    # on a CPU the convolution adds its bias at no cost; whoever watches it must find it there
    shift = conv.bias if x.is_cuda and not is_watched(x) else None
    x = norm.channel_last(convolve(conv, x, add_bias=shift is None), shift, gelu)
    return x, 2 + gelu


def build_out_norm(out_norm: str, channels: int) -> nn.Module:
    """Build the normalisation of the scan's output; the places in a Sequential are the published state-dict keys.

    Args:
        out_norm (str): ``ln``, ``none``, ``dwconv3``, ``cnorm``, ``softmax`` or ``sigmoid``.
        channels (int): Channels of the map.
    """
    if out_norm == 'ln':
        return LayerNorm(channels, autocast_output=True)
    if out_norm in ('dwconv3', 'cnorm'):
        norm = [LayerNorm(channels, autocast_output=True)] if out_norm == 'cnorm' else []
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        return ConvNorms(*norm, nn.Identity(), conv)
    kinds: dict = dict(none=nn.Identity, softmax=SpatialSoftmax, sigmoid=nn.Sigmoid)
    return kinds[out_norm]()
