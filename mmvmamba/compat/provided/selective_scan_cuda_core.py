"""``selective_scan_cuda_core``, a compiled module of VMamba's code."""

from ..scan import backward, forward

NAME = 'selective_scan_cuda_core'


def fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows=1) -> list:
    """Scan; see :func:`mmvmamba.compat.scan.forward`. ``nrows``, a choice of the original's kernels, means nothing.

    Returns:
        list[Tensor]: ``[out, x]``.
    """
    return forward(NAME, u, delta, A, B, C, D, delta_bias, delta_softplus, False)


def bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows=1) -> list:
    """Gradients of u, delta, A, B, C, D and delta_bias."""
    return backward(NAME, dout, u, delta, A, B, C, D, delta_bias, x, delta_softplus)
