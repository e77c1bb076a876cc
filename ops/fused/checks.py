"""Argument checks that several fused layers share."""

import torch
from torch.autograd import forward_ad

from ..checks import (
    FLOAT_DTYPES,
    autocast_enabled,
    check_float,
    check_same_device,
    check_same_dtype,
    check_shape,
    dtype_name,
)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_DTYPES = (torch.float32, torch.bfloat16)


def has_kernel_dtypes(x: torch.Tensor, *others) -> bool:
    """Whether the kernels for the device of ``x`` take its dtype and those of ``others``, tensors or None.

    Those for a CPU leave the derivatives that they lack to torch's own layers, which it always had there, and a trace,
    which tools that count FLOPs read.
    """
    dtypes = CPU_DTYPES if x.is_cpu else KERNEL_DTYPES
    if x.is_cpu and (torch.jit.is_tracing() or _takes_other_derivatives()):
        return False
    return x.dtype in dtypes and all(value is None or value.dtype in dtypes for value in others)


def _takes_other_derivatives() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is under way."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_dtype(op: str, out_dtype) -> None:
    """Check that ``out_dtype`` is a floating-point dtype or None."""
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f'{op}: out_dtype is {dtype_name(out_dtype)}, expected a floating-point dtype')


def check_convolution(op: str, x, weight, bias, out_dtype) -> torch.dtype:
    """Check a channel-last map, the weight and the bias of a convolution; returns the dtype of the result."""
    for name, value, dims, first in (('x', x, 'B, H, W, C', 1), ('weight', weight, 'C_out, C_in, k, k', 0)):
        check_float(op, name, value, dims)
        if value.dim() != 4:
            raise ValueError(f'{op}: {name} must have the dimensions ({dims}), got shape {tuple(value.shape)}')
        if any(size == 0 for size in value.shape[first:]):
            raise ValueError(f'{op}: {name} has an empty dimension, got shape {tuple(value.shape)} for ({dims})')
    if bias is not None:
        check_float(op, 'bias', bias, 'C_out')
        check_shape(op, 'bias', bias, (weight.shape[0],), 'an element an output channel')
    check_same_device(op, 'x', dict(x=x, weight=weight, bias=bias))
    check_dtype(op, out_dtype)
    return x.dtype if out_dtype is None else out_dtype


def check_linear(op: str, dims: dict, tensors: dict) -> None:
    """Check the input, weights and biases of linear layers; ``dims`` names their dimensions in errors."""
    for name, value in tensors.items():
        check_float(op, name, value, dims[name])
    check_same_device(op, 'x', tensors)
    x = tensors['x']
    for name, weight in tensors.items():
        if name.startswith('weight') and weight.dim() != 2:
            raise ValueError(f'{op}: {name} must have the dimensions ({dims[name]}), got shape {tuple(weight.shape)}')
    if x.dim() == 0:
        raise ValueError(f'{op}: x must have the dimensions (..., C), got shape ()')
    if not autocast_enabled(x.device.type):
        check_same_dtype(op, 'x', tensors)
    elif any(value.dtype == torch.float64 for value in tensors.values()):
        check_same_dtype(op, 'x', tensors, 'autocast leaves float64 as it is, so all must be float64, or none')


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """``x`` in autocast's dtype where that is on, as a linear layer's input is."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if autocast_enabled(device) and x.dtype != torch.float64 else x
