"""A linear layer without bias: one cast of its weight in mixed precision on a GPU, torch's layer elsewhere."""

from typing import Optional

import torch

from ...backend import takes_kernel
from ...checks import check_shape, records_gradients
from ..checks import autocast_input, check_linear
from . import naive, registration  # noqa: F401 (which defines the op)


def linear(x: torch.Tensor, weight: torch.Tensor, backend: Optional[str] = None) -> torch.Tensor:
    r"""A linear layer without bias, :math:`W x`.

    In mixed precision on a GPU it casts the weight once for forward and backward, and from torch 2.8 on the weight's
    gradient leaves its product in float32 rather than by way of the 16 bits of ``x``.

    Args:
        x (Tensor): (..., C), floating point; under autocast it is cast.
        weight (Tensor): (C_out, C) in the dtype of ``x``; under autocast, which casts all dtypes but float64, in any
            if none is float64.
        backend (str, optional): ``naive``, which is torch alone, or ``cuda``; see :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor: (..., C_out) in the dtype of ``x``, or in autocast's.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or dtypes differ outside autocast.
        ValueError: If shapes or devices do not fit together.
        BackendError: If the backend asked for can't run, or its kernels don't take these arguments.
    """
    check_linear('linear', dict(x='..., C', weight='C_out, C'), dict(x=x, weight=weight))
    check_shape('linear', 'weight', weight, (weight.shape[0], x.shape[-1]), 'C_out, the last dimension of x')
    x = autocast_input(x)
    if takes_kernel('linear', backend, _fits, x, weight):
        return torch.ops.mmvmamba.linear(x, weight, records_gradients(x, weight))[0]
    return naive.linear(x, weight)


def _fits(x, weight) -> bool:
    mixed = x.dtype in (torch.float16, torch.bfloat16) and weight.dtype == torch.float32
    return mixed and 0 not in (x.numel(), weight.numel())
