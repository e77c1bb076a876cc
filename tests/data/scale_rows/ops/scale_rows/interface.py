"""The public function: documentation, argument checks, choice of backend."""

from typing import Optional

import torch

from ..backend import resolve
from ..checks import check_same_device, check_same_dtype, check_shape, check_tensor
from . import naive, registration  # noqa: F401 (which defines the op)


def scale_rows(x: torch.Tensor, factors: torch.Tensor, backend: Optional[str] = None) -> torch.Tensor:
    """Multiply each row by a factor.

    Args:
        x (Tensor): (N, C), floating point.
        factors (Tensor): (N,), dtype of ``x``.
        backend (str, optional): See :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor: (N, C) in the dtype of ``x``.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: If a shape or a device is wrong.
        BackendError: If the backend asked for can't run.
    """
    op = 'scale_rows'
    check_tensor(op, 'x', x, 'N, C')
    check_tensor(op, 'factors', factors, 'N')
    tensors = dict(x=x, factors=factors)
    check_same_device(op, 'x', tensors)
    check_same_dtype(op, 'x', tensors)
    check_shape(op, 'factors', factors, x.shape[:1], 'one a row of x')
    training = torch.is_grad_enabled() and (x.requires_grad or factors.requires_grad)
    backend = resolve(op, x.device.type, backend, training)
    if backend == 'naive':
        return naive.scale_rows(x, factors)
    run = torch.ops.mmvmamba.scale_rows_triton if backend == 'triton' else torch.ops.mmvmamba.scale_rows
    return run(x, factors)
