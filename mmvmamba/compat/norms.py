"""The norms of ``mamba_ssm.ops.triton``, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn


def add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm):
    """Add a residual, if there is one, and normalise the last dimension.

    Args:
        x (Tensor): (..., C).
        weight (Tensor): (C,).
        bias (Tensor, optional): (C,).
        residual (Tensor, optional): In the shape of ``x``.
        eps (float): Added to the variance.
        prenorm (bool): Whether to return the sum too.
        residual_in_fp32 (bool): Whether the sum is float32, if there is no residual, whose dtype it has.
        is_rms_norm (bool): Whether the mean is left where it is.

    Returns:
        Tensor | tuple[Tensor, Tensor]: The normalised sum in the dtype of ``x``, and the sum.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    if is_rms_norm:
        y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
        y = y if bias is None else y + bias.to(wide)
    else:
        y = F.layer_norm(total, weight.shape, weight.to(wide), None if bias is None else bias.to(wide), eps)
    if not prenorm:
        return y.to(x.dtype)
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    return y.to(x.dtype), total.to(torch.promote_types(kept, torch.float32) if residual_in_fp32 else kept)


def layer_norm_fn(
    x, weight, bias, residual=None, *, eps=1e-6, prenorm=False, residual_in_fp32=False, is_rms_norm=False
):  # fmt: skip
    """:func:`add_norm`; options by name only, since their order differs between versions of mamba_ssm."""
    return add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


def rms_norm_fn(x, weight, bias, residual=None, *, prenorm=False, residual_in_fp32=False, eps=1e-6):
    """The norm of :class:`RMSNorm` as a function; see :func:`add_norm`."""
    return add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last dimension, with a weight and no bias.

    Args:
        hidden_size (int): Size of the last dimension.
        eps (float): Added to the mean square. Default: 1e-5.
        device (torch.device, optional): Of the weight. Default: None.
        dtype (torch.dtype, optional): Of the weight. Default: None.
    """

    def __init__(self, hidden_size, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter('bias', None)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        """Normalise (..., C); see :func:`add_norm`."""
        return add_norm(x, self.weight, None, residual, self.eps, prenorm, residual_in_fp32, True)
