"""``selective_scan_cuda_oflex``, a compiled module of VMamba's code whose output may be float32."""

from ..scan import backward, forward

NAME = 'selective_scan_cuda_oflex'


def fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows=1, out_float=True) -> list:
    """Scan; see :func:`mmvmamba.compat.scan.forward`. ``nrows``, a choice of the original's kernels, means nothing.

    Returns:
        list[Tensor]: ``[out, x]``, the first in float32 if ``out_float``.
    """
    return forward(NAME, u, delta, A, B, C, D, delta_bias, delta_softplus, out_float)


def bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows=1) -> list:
    """Gradients of u, delta, A, B, C, D and delta_bias."""
    return backward(NAME, dout, u, delta, A, B, C, D, delta_bias, x, delta_softplus)
