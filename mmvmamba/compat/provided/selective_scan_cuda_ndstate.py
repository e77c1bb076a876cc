"""``selective_scan_cuda_ndstate``, a compiled module of VMamba's code for one state, a dimension that it leaves out."""

import torch

from ..scan import backward, forward

NAME = 'selective_scan_cuda_ndstate'


def fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows=1) -> list:
    """Scan with A (dim,), B and C (batch, K, L); see :func:`mmvmamba.compat.scan.forward`.

    Returns:
        list[Tensor]: ``[out, x]``.
    """
    A, B, C = _with_state(A, B, C)
    return forward(NAME, u, delta, A, B, C, D, delta_bias, delta_softplus, False)


def bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows=1) -> list:
    """Gradients of u, delta, A, B, C, D and delta_bias."""
    A, B, C = _with_state(A, B, C)
    du, ddelta, dA, dB, dC, *others = backward(NAME, dout, u, delta, A, B, C, D, delta_bias, x, delta_softplus)
    return [du, ddelta, dA.squeeze(1), dB.squeeze(2), dC.squeeze(2), *others]


def _with_state(A, B, C) -> tuple:
    for name, tensor, dims in (('A', A, 'dim'), ('B', B, 'batch, K, L'), ('C', C, 'batch, K, L')):
        count = len(dims.split(','))
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != count:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f'{NAME}: {name} must have the dimensions ({dims}), got {found}')
    return A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2)
