"""Stochastic depth: a residual branch is dropped for some images while training."""

from typing import Optional

import torch
from torch import nn

from .fusion import fusible


@fusible
class DropPath(nn.Module):
    """Drop whole samples, `Deep Networks with Stochastic Depth <https://arxiv.org/abs/1603.09382>`_.

    A sample of (B, ...) is kept with probability 1 - ``rate`` and then divided by it.

    Args:
        rate (float): Probability to drop a sample while training. Default: 0.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (factors,) = self.draw(x)
        return x if factors is None else x * factors.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))

    def draw(self, x: torch.Tensor, branches: int = 1) -> tuple[Optional[torch.Tensor], ...]:
        """Draw what each sample of ``x`` (B, ...) is multiplied by, for several branches at once.

        A fused pass leaves the product to the addition of the residual, see :func:`mmvmamba.ops.add_layer_norm`.

        Args:
            x (Tensor): (B, ...), for its batch size and device.
            branches (int): How many branches are drawn for. Default: 1.

        Returns:
            tuple[Tensor | None]: For each branch (B,) float32, or None where nothing is dropped.
        """
        if self.rate == 0 or not self.training:
            return (None,) * branches
        keep = 1 - self.rate
        kept = torch.empty(branches, x.shape[0], device=x.device).bernoulli_(keep)
        return (kept.div_(keep) if keep > 0 else kept).unbind()

    def extra_repr(self) -> str:
        return f'rate={self.rate}'
