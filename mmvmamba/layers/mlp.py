"""The channel mixer of a block: MLP or gated MLP on channel-last maps."""

import torch
from torch import nn

from mmvmamba.ops import mlp

from .linear import is_plain
from .options import ACTIVATIONS


class Mlp(nn.Module):
    """Two linear layers with an activation between them, (..., C) to (..., C).

    Args:
        channels (int): C.
        hidden_channels (int): Width in between.
        act (str): silu, gelu, relu or sigmoid. Default: ``gelu``.
        dropout (float): Dropout after each linear layer. Default: 0.
        gated (bool): Whether ``fc1`` also makes a gate, whose activation multiplies the hidden values (gMLP).
            Default: False.
    """

    def __init__(
        self, channels: int, hidden_channels: int, act: str = 'gelu', dropout: float = 0.0, gated: bool = False
    ):
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(channels, hidden_channels * (2 if gated else 1))
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden_channels, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            x, gate = self.fc1(x).chunk(2, dim=-1)
            return self.drop(self.fc2(x * self.act(gate)))
        if self._is_plain() and (self.drop.p == 0 or not self.training):
            return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))

    def _is_plain(self) -> bool:
        """Whether one op computes what the layers do."""
        exact_gelu = type(self.act) is nn.GELU and self.act.approximate == 'none' and not self.act._forward_hooks
        return exact_gelu and all(is_plain(layer) and layer.bias is not None for layer in (self.fc1, self.fc2))
