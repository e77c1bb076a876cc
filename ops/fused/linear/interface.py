"""Linear layers: one alone, and two with a GELU between them. Ops on a GPU; torch's own layers elsewhere."""

import torch
import torch.nn.functional as F

from ...backend import has_cuda_kernel
from ...checks import autocast_enabled, check_float, check_same_device, check_same_dtype, check_shape, dtype_name
from . import library

KERNEL_DTYPES = ('float32', 'float16', 'bfloat16')
WIDTH = 8  # values that a thread of the kernels takes


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    r"""A linear layer without bias, :math:`W x`.

    In mixed precision on a GPU it casts the weight once for forward and backward, and from torch 2.8 on the weight's
    gradient leaves its product in float32 rather than by way of the 16 bits of ``x``.

    Args:
        x (Tensor): (..., C), floating point; under autocast it is cast.
        weight (Tensor): (C_out, C) in the dtype of ``x``; under autocast, which casts all dtypes but float64, in any
            if none is float64.

    Returns:
        Tensor: (..., C_out) in the dtype of ``x``, or in autocast's.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or dtypes differ outside autocast.
        ValueError: If shapes or devices do not fit together.
    """
    _check('linear', dict(x='..., C', weight='C_out, C'), dict(x=x, weight=weight))
    check_shape('linear', 'weight', weight, (weight.shape[0], x.shape[-1]), 'C_out, the last dimension of x')
    x = _autocast(x)
    mixed = dtype_name(x.dtype) in ('float16', 'bfloat16') and weight.dtype == torch.float32
    if x.is_cuda and mixed and 0 not in (x.numel(), weight.numel()) and _has_kernel('linear'):
        training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return library.linear(x, weight, training)[0]
    return F.linear(x, weight)


def mlp(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    r"""Two linear layers with a GELU between them, :math:`W_2\, \mathrm{GELU}(W_1 x + b_1) + b_2`.

    The GPU kernel keeps the hidden values before GELU, makes GELU again in backward, and so saves the largest tensor
    of a block.  The numbers are those of torch's layers up to the rounding of ``x``'s dtype.

    Args:
        x (Tensor): (..., C), floating point; under autocast it is cast, as a linear layer's input is.
        weight1 (Tensor): (hidden, C), like the others in the dtype of ``x``; under autocast, which casts all dtypes
            but float64, in any if none is float64.
        bias1 (Tensor): (hidden,).
        weight2 (Tensor): (C_out, hidden).
        bias2 (Tensor): (C_out,).

    Returns:
        Tensor: (..., C_out) in the dtype of ``x``, or in autocast's.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or dtypes differ outside autocast.
        ValueError: If shapes or devices do not fit together.
    """
    dims = dict(x='..., C', weight1='hidden, C', bias1='hidden', weight2='C_out, hidden', bias2='C_out')
    _check('mlp', dims, dict(x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2))
    check_shape('mlp', 'weight1', weight1, (weight1.shape[0], x.shape[-1]), 'hidden, the last dimension of x')
    check_shape('mlp', 'bias1', bias1, weight1.shape[:1], 'hidden of weight1')
    check_shape('mlp', 'weight2', weight2, (weight2.shape[0], weight1.shape[0]), 'C_out, hidden of weight1')
    check_shape('mlp', 'bias2', bias2, weight2.shape[:1], 'C_out of weight2')
    x = _autocast(x)
    tensors = (x, weight1, bias1, weight2, bias2)
    if _fused(*tensors):
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return library.mlp(*tensors, training)[0]
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def _check(op: str, dims: dict, tensors: dict) -> None:
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


def _autocast(x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if autocast_enabled(device) and x.dtype != torch.float64 else x


def _fused(x, weight1, bias1, weight2, bias2) -> bool:
    dtype = weight1.dtype
    return (
        x.is_cuda
        and dtype_name(x.dtype) in KERNEL_DTYPES
        and dtype in (x.dtype, torch.float32)
        and (dtype == x.dtype or torch.is_autocast_enabled('cuda'))
        and bias1.dtype == weight2.dtype == bias2.dtype == dtype
        and x.shape[-1] % WIDTH == weight1.shape[0] % WIDTH == weight2.shape[0] % WIDTH == 0
        and 0 not in (x.numel(), weight1.numel(), weight2.numel())
        and _has_kernel('mlp')
    )


@torch._dynamo.assume_constant_result
def _has_kernel(op: str) -> bool:
    return has_cuda_kernel(op)
