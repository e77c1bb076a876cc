"""Convolutions with their norms, which on a GPU take over what would be a pass over the map of its own."""

import torch
from torch import nn

from .convolution import ConvChannelLast
from .norm import LayerNorm

FUSING = ('cuda',)  # devices on which adding a bias and GELU cost a pass each


class ConvNorms(nn.Sequential):
    """Layers on channel-last maps, (B, H, W, C) to (B, H', W', C'), among them convolutions followed by their norms.

    On a GPU a layer norm adds the bias of the convolution before it, and applies a GELU after it, in its own pass.
    Where one of the three is of another type or has hooks, each layer runs by itself, as on a CPU.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type not in FUSING:
            return super().forward(x)
        layers = [layer for layer in self if type(layer) is not nn.Identity]
        while layers:
            conv, norm, act = (*layers, None, None)[:3]
            gelu = type(act) is nn.GELU and act.approximate == 'none'
            group = layers[: 2 + gelu]
            if isinstance(conv, ConvChannelLast) and type(norm) is LayerNorm and not any(map(_has_hooks, group)):
                x = norm(conv(x, add_bias=False), shift=conv.bias, gelu=gelu)
            else:
                group = layers[:1]
                x = conv(x)
            layers = layers[len(group) :]
        return x


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
