"""Linear, GELU, linear: one op on a GPU that keeps less for backward; torch's own layers elsewhere."""

import torch
import torch.nn.functional as F

from ..backend import has_cuda_kernel
from ..checks import autocast_enabled, check_float, check_same_device, check_same_dtype, check_shape, dtype_name
from . import library

KERNEL_DTYPES = ('float32', 'float16', 'bfloat16')
WIDTH = 8  # values that a thread of the kernels takes


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
    _check(dict(x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2))
    device = x.device.type
    if autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    tensors = (x, weight1, bias1, weight2, bias2)
    if _fused(*tensors):
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return library.mlp(*tensors, training)[0]
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def _check(tensors) -> None:
    op, dims = 'mlp', dict(x='..., C', weight1='hidden, C', bias1='hidden', weight2='C_out, hidden', bias2='C_out')
    for name, value in tensors.items():
        check_float(op, name, value, dims[name])
    check_same_device(op, 'x', tensors)
    x, weight1, bias1, weight2, bias2 = tensors.values()
    for name, weight in (('weight1', weight1), ('weight2', weight2)):
        if weight.dim() != 2:
            raise ValueError(f'{op}: {name} must have the dimensions ({dims[name]}), got shape {tuple(weight.shape)}')
    if x.dim() == 0:
        raise ValueError(f'{op}: x must have the dimensions (..., C), got shape ()')
    check_shape(op, 'weight1', weight1, (weight1.shape[0], x.shape[-1]), 'hidden, the last dimension of x')
    check_shape(op, 'bias1', bias1, weight1.shape[:1], 'hidden of weight1')
    check_shape(op, 'weight2', weight2, (weight2.shape[0], weight1.shape[0]), 'C_out, hidden of weight1')
    check_shape(op, 'bias2', bias2, weight2.shape[:1], 'C_out of weight2')
    if not autocast_enabled(x.device.type):
        check_same_dtype(op, 'x', tensors)
    elif any(value.dtype == torch.float64 for value in tensors.values()):
        check_same_dtype(op, 'x', tensors, 'autocast leaves float64 as it is, so all must be float64, or none')


def _fused(x, weight1, bias1, weight2, bias2) -> bool:
    dtype = weight1.dtype
    return (
        x.is_cuda
        and dtype_name(x.dtype) in KERNEL_DTYPES
        and dtype in (x.dtype, torch.float32)
        and (dtype == x.dtype or torch.is_autocast_enabled('cuda'))
        and bias1.dtype == weight2.dtype == bias2.dtype == dtype
        and x.shape[-1] % WIDTH == weight1.shape[0] % WIDTH == weight2.shape[0] % WIDTH == 0
        and x.numel() > 0
        and _has_kernel()
    )


@torch._dynamo.assume_constant_result
def _has_kernel() -> bool:
    return has_cuda_kernel('mlp')
