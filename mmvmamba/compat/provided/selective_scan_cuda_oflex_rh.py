"""``selective_scan_cuda_oflex_rh``, a compiled module of Spatial-Mamba's code, whose output are the states."""

from ..states import backward, forward

NAME = 'selective_scan_cuda_oflex_rh'


def fwd(u, delta, A, B, D, delta_bias, delta_softplus, nrows=1, out_float=True) -> list:
    """All states of a scan; see :func:`mmvmamba.compat.states.forward`.

    Returns:
        list[Tensor]: ``[out, x]``, the first (batch, dim, N, L) and in float32 if ``out_float``.
    """
    return forward(NAME, u, delta, A, B, D, delta_bias, delta_softplus, out_float)


def bwd(u, delta, A, B, D, delta_bias, dout, x, delta_softplus, nrows=1) -> list:
    """Gradients of u, delta, A, B, D (zero, since it is ignored) and delta_bias."""
    return backward(NAME, dout, u, delta, A, B, D, delta_bias, x, delta_softplus)
