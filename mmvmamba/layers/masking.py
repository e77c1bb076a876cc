"""Masked images: cells of the stem's map that a learned token replaces, for pretraining without labels."""

import torch


def apply_mask(x: torch.Tensor, mask: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Put a token in the place of the masked cells, section 3.1 of `SimMIM <https://arxiv.org/abs/2111.09886>`_.

    Args:
        x (Tensor): Map (B, C, H, W).
        mask (Tensor): (B, H, W), booleans or numbers; 1 is masked.
        token (Tensor): (1, C, 1, 1).

    Returns:
        Tensor: (B, C, H, W) in the dtype of ``x``.

    Raises:
        TypeError: If ``mask`` is no tensor.
        ValueError: If it has another shape.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f'mask is a {type(mask).__name__}, expected a tensor')
    cells = (x.shape[0], *x.shape[2:])
    if tuple(mask.shape) != cells:
        raise ValueError(f'mask has shape {tuple(mask.shape)}, expected {cells}, a number for each cell of the stem')
    share = mask.to(x.dtype)[:, None]
    return x * (1 - share) + token.to(x.dtype) * share
