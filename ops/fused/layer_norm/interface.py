"""The layer normalisation of channel-last maps: kernels for short rows, torch's own elsewhere."""

import sys
from typing import Optional, Tuple

import torch

from ...backend import takes_kernel
from ...checks import check_flag, check_float, check_range, check_same_device, check_shape, records_gradients
from ..checks import CPU_DTYPES, KERNEL_DTYPES, check_dtype, has_kernel_dtypes
from . import naive
from .registration import OUTPUT_TYPES

MAX_CHANNELS = 1024  # what the registers of the GPU kernel hold
VECTORS = ('weight', 'bias', 'shift')  # arguments with an element a channel


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    out_dtype: Optional[torch.dtype] = None,
    shift: Optional[torch.Tensor] = None,
    gelu: bool = False,
    backend: Optional[str] = None,
) -> torch.Tensor:
    """Normalise the last dimension, `Layer Normalization <https://arxiv.org/abs/1607.06450>`_, equation 4.

    Statistics and arithmetic are float32 for half-precision input.  For a backbone's rows the CUDA kernel is
    several times faster than torch's, and than what Inductor makes of the backward.  After a convolution the kernels
    add its bias and apply the activation in the same pass.

    Args:
        x (Tensor): (..., C), floating point.
        weight (Tensor): (C,).
        bias (Tensor): (C,).
        eps (float): Added to the variance. Default: 1e-5.
        out_dtype (torch.dtype, optional): Dtype of the result. Default: that of ``x``.
        shift (Tensor, optional): (C,), added to ``x`` first: the bias of the layer before. Default: None.
        gelu (bool): Whether to apply GELU to the normalised values. Default: False.
        backend (str, optional): ``naive``, which is torch alone, ``cpu`` or ``cuda``; see :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor: (..., C) in ``out_dtype``.

    Raises:
        TypeError: If an argument is of another type than these.
        ValueError: If shapes or devices do not fit together, or a value is out of range.
        BackendError: If the backend asked for can't run, or its kernels don't take these arguments.
    """
    tensors = dict(x=x, weight=weight, bias=bias)
    if shift is not None:
        tensors['shift'] = shift
    _check('layer_norm', tensors, eps, out_dtype)
    check_flag('layer_norm', 'gelu', gelu)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if takes_kernel('layer_norm', backend, _fits, x, weight, bias, out_dtype, gelu or shift is not None):
        training = records_gradients(*tensors.values())
        shift = None if shift is None else shift.float()
        arguments = (x, shift, weight, bias, float(eps), OUTPUT_TYPES.index(out_dtype), gelu, training)
        return torch.ops.mmvmamba.layer_norm(*arguments)[0]
    return naive.layer_norm(x, weight, bias, eps, out_dtype, shift, gelu)


def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    out_dtype: Optional[torch.dtype] = None,
    factors: Optional[torch.Tensor] = None,
    backend: Optional[str] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Add a residual branch and normalise the sum: :func:`layer_norm` of ``x + factors * branch``.

    One kernel, forward and backward, instead of one for each step.

    Args:
        x (Tensor): (B, ..., C), floating point.
        branch (Tensor): (B, ..., C), floating point.
        weight (Tensor): (C,).
        bias (Tensor): (C,).
        eps (float): Added to the variance. Default: 1e-5.
        out_dtype (torch.dtype, optional): Dtype of the normalised map. Default: that of the sum.
        factors (Tensor, optional): (B,), a factor for each sample's branch, as stochastic depth has. Default: 1.
        backend (str, optional): ``naive``, which is torch alone, ``cpu`` or ``cuda``; see :mod:`mmvmamba.ops.backend`.

    Returns:
        tuple[Tensor]: The sum, in the common dtype of ``x`` and ``branch``, and the normalised map in ``out_dtype``,
        both (B, ..., C).

    Raises:
        TypeError: If an argument is of another type than these.
        ValueError: If shapes or devices do not fit together, or a value is out of range.
        BackendError: If the backend asked for can't run, or its kernels don't take these arguments.
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
    if takes_kernel(op, backend, _fits_sum, x, weight, bias, out_dtype, branch):
        training = records_gradients(x, branch, weight, bias)
        factors = None if factors is None else factors.float().contiguous()
        return torch.ops.mmvmamba.add_layer_norm(x, branch, factors, weight, bias, float(eps), training)[:2]
    x = naive.add_branch(x, branch, factors)
    return x, layer_norm(x, weight, bias, eps, out_dtype, backend=backend)


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
    check_dtype(op, out_dtype)


def _fits(x, weight, bias, out_dtype, after_conv=False) -> bool:
    channels = x.shape[-1]
    return (
        weight.dtype == bias.dtype == torch.float32
        and has_kernel_dtypes(x)
        and out_dtype in (CPU_DTYPES if x.is_cpu else KERNEL_DTYPES)
        and (out_dtype == x.dtype or torch.float32 in (out_dtype, x.dtype))
        # of the GPU kernel after a convolution the map has the type of the output, or less
        and (x.is_cpu or not after_conv or out_dtype in (x.dtype, torch.float32))
        and (x.is_cpu or (channels % 4 == 0 and channels <= MAX_CHANNELS))
        and x.numel() > 0
    )


def _fits_sum(x, weight, bias, out_dtype, branch) -> bool:
    same = torch.promote_types(x.dtype, branch.dtype) == x.dtype and branch.dtype == out_dtype
    return same and _fits(x, weight, bias, out_dtype)
