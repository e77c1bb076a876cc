"""Two linear layers with a GELU between them in one op, on a GPU and a CPU; torch's own layers elsewhere."""

from typing import Optional

import torch

from ...backend import takes_kernel
from ...checks import check_shape, records_gradients
from ..checks import autocast_input, check_linear, has_kernel_dtypes
from . import naive, registration  # noqa: F401 (which defines the op)

WIDTH = 8  # values that a thread of the GPU kernels takes


def mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    backend: Optional[str] = None,
) -> torch.Tensor:
    r"""Two linear layers with a GELU between them, :math:`W_2\, \mathrm{GELU}(W_1 x + b_1) + b_2`.

    The kernels keep the hidden values before GELU, make GELU again in backward, and so save the largest tensor of a
    block; without gradients those for a CPU keep no hidden values, which stay in its cache.  The numbers are those of
    torch's layers up to the rounding of ``x``'s dtype.

    Args:
        x (Tensor): (..., C), floating point; under autocast it is cast, as a linear layer's input is.
        weight1 (Tensor): (hidden, C), like the others in the dtype of ``x``; under autocast, which casts all dtypes
            but float64, in any if none is float64.
        bias1 (Tensor): (hidden,).
        weight2 (Tensor): (C_out, hidden).
        bias2 (Tensor): (C_out,).
        backend (str, optional): ``naive``, which is torch alone, ``cpu`` or ``cuda``; see :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor: (..., C_out) in the dtype of ``x``, or in autocast's.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or dtypes differ outside autocast.
        ValueError: If shapes or devices do not fit together.
        BackendError: If the backend asked for can't run, or its kernels don't take these arguments.
    """
    dims = dict(x='..., C', weight1='hidden, C', bias1='hidden', weight2='C_out, hidden', bias2='C_out')
    check_linear('mlp', dims, dict(x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2))
    check_shape('mlp', 'weight1', weight1, (weight1.shape[0], x.shape[-1]), 'hidden, the last dimension of x')
    check_shape('mlp', 'bias1', bias1, weight1.shape[:1], 'hidden of weight1')
    check_shape('mlp', 'weight2', weight2, (weight2.shape[0], weight1.shape[0]), 'C_out, hidden of weight1')
    check_shape('mlp', 'bias2', bias2, weight2.shape[:1], 'C_out of weight2')
    x = autocast_input(x)
    tensors = (x, weight1, bias1, weight2, bias2)
    if takes_kernel('mlp', backend, _fits, *tensors):
        return torch.ops.mmvmamba.mlp(*tensors, records_gradients(*tensors))[0]
    return naive.mlp(*tensors)


def _fits(x, weight1, bias1, weight2, bias2) -> bool:
    dtype = weight1.dtype
    return (
        has_kernel_dtypes(x)
        and dtype in (x.dtype, torch.float32)
        and (dtype == x.dtype or torch.is_autocast_enabled(x.device.type))
        and bias1.dtype == weight2.dtype == bias2.dtype == dtype
        and (x.is_cpu or x.shape[-1] % WIDTH == weight1.shape[0] % WIDTH == weight2.shape[0] % WIDTH == 0)
        and 0 not in (x.numel(), weight1.numel(), weight2.numel())
    )
