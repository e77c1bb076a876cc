"""Stochastic depth: a residual branch is dropped for some images while training."""

import torch
from torch import nn


class DropPath(nn.Module):
    """Drop whole samples, `Deep Networks with Stochastic Depth <https://arxiv.org/abs/1603.09382>`_.

    A sample is kept with probability 1 - ``rate`` and then divided by it, in one pass over the map.

    Args:
        rate (float): Probability to drop a sample while training. Default: 0.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) to (B, ...)."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        if keep == 0:
            return torch.zeros_like(x)
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)
        return x * mask

    def extra_repr(self) -> str:
        return f'rate={self.rate}'
