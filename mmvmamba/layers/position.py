"""A learned position embedding of the stem's map, for images of any size."""

import torch
import torch.nn.functional as F
from torch import nn


def build_position(channels: int, side: int) -> nn.Parameter:
    """An embedding (1, channels, side, side), drawn from a truncated normal distribution of deviation 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, channels, side, side), std=0.02))


def resize_position(embedding: torch.Tensor, size: tuple) -> torch.Tensor:
    """Resize an embedding (1, C, h, w) bicubically to (1, C, *size), as the published code does when it loads one."""
    if tuple(embedding.shape[2:]) == tuple(size):
        return embedding
    exact = embedding if embedding.dtype == torch.float64 else embedding.float()
    resized = F.interpolate(exact, size=tuple(size), mode='bicubic', align_corners=False)
    return resized.to(embedding.dtype)


def add_position(x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Add an embedding (1, C, h, w) to a map (B, C, H, W); of another size, it is resized."""
    return x + resize_position(embedding, x.shape[2:])
