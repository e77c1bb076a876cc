"""The channel mixer of a block: MLP or gated MLP."""

import torch
from torch import nn

from mmvmamba.ops import mlp

from .fusion import fusible, is_plain, to_first, to_last
from .options import ACTIVATIONS


@fusible
class Mlp(nn.Module):
    """Two linear layers with an activation between them, (B, C, H, W) to (B, C, H, W).

    The layers inside see (B, H, W, C).

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
        return to_first(self.channel_last(to_last(x)))

    def channel_last(self, x: torch.Tensor) -> torch.Tensor:
        """The same on a channel-last map, (B, H, W, C) to (B, H, W, C)."""
        if self.gated:
            x, gate = self.fc1(x).chunk(2, dim=-1)
            return self.drop(self.fc2(x * self.act(gate)))
        fc1, act, fc2, drop = self.fc1, self.act, self.fc2, self.drop
        if (
            is_plain(act, nn.GELU)
            and act.approximate == 'none'
            and is_plain(drop, nn.Dropout)
            and (drop.p == 0 or not drop.training)
            and is_plain(fc1, nn.Linear)
            and is_plain(fc2, nn.Linear)
        ):
            bias1, bias2 = fc1.bias, fc2.bias
            if bias1 is not None and bias2 is not None:
                return mlp(x, fc1.weight, bias1, fc2.weight, bias2)
        return drop(fc2(drop(act(fc1(x)))))
