"""The layer normalisation of channel-last maps: a kernel for short rows on a GPU, torch's own elsewhere."""

import sys
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from ...backend import has_cuda_kernel
from ...checks import FLOAT_DTYPES, check_flag, check_float, check_range, check_same_device, check_shape, dtype_name
from . import library

KERNEL_DTYPES = ('float32', 'float16', 'bfloat16')
MAX_CHANNELS = 1024  # what the kernel's registers hold
VECTORS = ('weight', 'bias', 'shift')  # arguments with an element a channel


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    out_dtype: Optional[torch.dtype] = None,
    shift: Optional[torch.Tensor] = None,
    gelu: bool = False,
) -> torch.Tensor:
    """Normalise the last dimension, `Layer Normalization <https://arxiv.org/abs/1607.06450>`_, equation 4.

    Statistics and arithmetic are float32 for half-precision input.  For a backbone's rows the CUDA kernel is
    several times faster than torch's, and than what Inductor makes of the backward.  All give the same numbers up to
    rounding, so there is no choice of backend.  After a convolution the kernel adds its bias and applies the activation
    in the same pass.

    Args:
        x (Tensor): (..., C), floating point.
        weight (Tensor): (C,).
        bias (Tensor): (C,).
        eps (float): Added to the variance. Default: 1e-5.
        out_dtype (torch.dtype, optional): Dtype of the result. Default: that of ``x``.
        shift (Tensor, optional): (C,), added to ``x`` first: the bias of the layer before. Default: None.
        gelu (bool): Whether to apply GELU to the normalised values. Default: False.

    Returns:
        Tensor: (..., C) in ``out_dtype``.

    Raises:
        TypeError: If an argument is of another type than these.
        ValueError: If shapes or devices do not fit together, or a value is out of range.
    """
    tensors = dict(x=x, weight=weight, bias=bias)
    if shift is not None:
        tensors['shift'] = shift
    _check('layer_norm', tensors, eps, out_dtype)
    check_flag('layer_norm', 'gelu', gelu)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    after_conv = gelu or shift is not None  # whose map has the type of the output, or less
    if _fused(x, weight, bias, out_dtype) and (not after_conv or out_dtype in (x.dtype, torch.float32)):
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
        shift = None if shift is None else shift.float()
        return library.layer_norm(x, shift, weight, bias, float(eps), out_dtype, gelu, training)[0]
    dtype = torch.promote_types(x.dtype, weight.dtype)  # torch wants one dtype
    x = x.to(dtype) if shift is None else x.to(dtype) + shift.to(dtype)
    # a number also while a shape is traced
    y = F.layer_norm(x, [int(x.shape[-1])], weight.to(dtype), bias.to(dtype), eps)
    return (F.gelu(y) if gelu else y).to(out_dtype)


def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    out_dtype: Optional[torch.dtype] = None,
    factors: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Add a residual branch and normalise the sum: :func:`layer_norm` of ``x + factors * branch``.

    One kernel on a GPU, forward and backward, instead of one for each step.

    Args:
        x (Tensor): (B, ..., C), floating point.
        branch (Tensor): (B, ..., C), floating point.
        weight (Tensor): (C,).
        bias (Tensor): (C,).
        eps (float): Added to the variance. Default: 1e-5.
        out_dtype (torch.dtype, optional): Dtype of the normalised map. Default: that of the sum.
        factors (Tensor, optional): (B,), a factor for each sample's branch, as stochastic depth has. Default: 1.

    Returns:
        tuple[Tensor]: The sum, in the common dtype of ``x`` and ``branch``, and the normalised map in ``out_dtype``,
        both (B, ..., C).

    Raises:
        TypeError: If an argument is of another type than these.
        ValueError: If shapes or devices do not fit together, or a value is out of range.
    """
    op = 'add_layer_norm'
    _check(op, dict(x=x, branch=branch, weight=weight, bias=bias), eps, out_dtype)
    check_shape(op, 'branch', branch, x.shape, 'that of x')
    if factors is not None:
        check_float(op, 'factors', factors, 'B')
        check_shape(op, 'factors', factors, x.shape[:1], 'the first dimension of x')
        check_same_device(op, 'x', dict(x=x, factors=factors))
    sum_dtype = torch.promote_types(x.dtype, branch.dtype)
    out_dtype = sum_dtype if out_dtype is None else out_dtype
    if sum_dtype == x.dtype and branch.dtype == out_dtype and _fused(x, weight, bias, out_dtype):
        tensors = (x, branch, weight, bias)
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        factors = None if factors is None else factors.float().contiguous()
        return library.add_layer_norm(x, branch, factors, weight, bias, float(eps), out_dtype, training)[:2]
    if factors is not None:
        branch = branch * factors.to(branch.dtype).view(-1, *(1,) * (branch.dim() - 1))
    x = x + branch
    return x, layer_norm(x, weight, bias, eps, out_dtype)


def _check(op, tensors, eps, out_dtype) -> None:
    x = tensors['x']
    for name, value in tensors.items():
        check_float(op, name, value, 'C' if name in VECTORS else '..., C')
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f'{op}: x must have the dimensions (..., C) with C from 1, got shape {tuple(x.shape)}')
    for name in VECTORS:
        if name in tensors:
            check_shape(op, name, tensors[name], x.shape[-1:], 'the last dimension of x')
    check_same_device(op, 'x', tensors)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f'{op}: eps is {eps!r}, expected a number from 0')
    check_range(op, 'eps', eps, 0, sys.float_info.max)
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f'{op}: out_dtype is {dtype_name(out_dtype)}, expected a floating-point dtype')


def _fused(x, weight, bias, out_dtype) -> bool:
    channels = x.shape[-1]
    return (
        x.is_cuda
        and weight.dtype == bias.dtype == torch.float32
        and dtype_name(x.dtype) in KERNEL_DTYPES
        and dtype_name(out_dtype) in KERNEL_DTYPES
        and (out_dtype == x.dtype or torch.float32 in (out_dtype, x.dtype))
        and channels % 4 == 0
        and channels <= MAX_CHANNELS
        and x.numel() > 0
        and _has_kernel()
    )


@torch._dynamo.assume_constant_result
def _has_kernel() -> bool:
    return has_cuda_kernel('layer_norm')
