"""Convolutions with their norms, which on a GPU take over what would be a pass over the map of its own."""

import torch
from torch import nn

from .convolution import ConvChannelLast
from .norm import LayerNorm


class ConvNorms(nn.Sequential):
    """Layers on channel-last maps, (B, H, W, C) to (B, H', W', C'): each convolution is followed by its norm.

    On a GPU a layer norm adds the bias of its convolution in its own pass.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deferring = x.is_cuda and any(isinstance(layer, LayerNorm) for layer in self)
        shift = None
        for layer in self:
            if deferring and isinstance(layer, ConvChannelLast):
                x, shift = layer(x, add_bias=False), layer.bias
            elif isinstance(layer, LayerNorm):
                x, shift = layer(x, shift=shift), None
            else:
                x = layer(x)
        return x
