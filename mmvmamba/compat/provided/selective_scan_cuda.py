"""``selective_scan_cuda``, the compiled module of the package mamba_ssm."""

from ..scan import backward, check_gate, forward, gate_backward

NAME = 'selective_scan_cuda'


def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> list:
    """Scan; see :func:`mmvmamba.compat.scan.forward`.

    Returns:
        list[Tensor]: ``[out, x]``, or with a gate ``[out, x, out_z]``.
    """
    return forward(NAME, u, delta, A, B, C, D, delta_bias, delta_softplus, False, z)


def bwd(
    u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z
) -> list:  # fmt: skip
    """Gradients of the gated output, or without a gate of the output.

    Returns:
        list[Tensor | None]: Those of u, delta, A, B, C, D and delta_bias; with a gate that of z, which is ``dz`` if
        that was given; and with ``recompute_out_z`` the gated output.
    """
    if z is None:
        return backward(NAME, dout, u, delta, A, B, C, D, delta_bias, x, delta_softplus)
    check_gate(NAME, z, u)
    gradient, dz, out_z = gate_backward(NAME, dout, z, out, dz, recompute_out_z)
    grads = backward(NAME, gradient, u, delta, A, B, C, D, delta_bias, x, delta_softplus)
    return [*grads, dz] if out_z is None else [*grads, dz, out_z]
