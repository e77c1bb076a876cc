"""The public selective scan: documented function, argument checks, choice of backend."""

from typing import Any, Optional

import torch

from ..backend import classify_length, resolve
from ..checks import (
    MAX_STATE,
    autocast_enabled,
    check_flag,
    check_out_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_state_dtype,
    check_tensor,
    check_values,
    promote,
    records_gradients,
    state_dtype,
)
from . import naive, registration  # noqa: F401 (which defines the op)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional[torch.Tensor] = None,
    delta_bias: Optional[torch.Tensor] = None,
    delta_softplus: bool = False,
    *,
    out_dtype: Optional[torch.dtype] = None,
    return_last_state: bool = False,
    check_finite: bool = False,
    backend: Optional[str] = None,
) -> Any:
    r"""Selective scan (S6) of `Mamba <https://arxiv.org/abs/2312.00752>`_, equations 2a, 2b and algorithm 2.

    .. math::
        h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t u_t, \qquad y_t = C_t^\top h_t + D u_t

    with :math:`h_0 = 0`.  Channels come in K groups of equal size; the channels of a group share B and C.

    Args:
        u (Tensor): Input, (batch, dim, L), float32, float16, bfloat16 or float64.
        delta (Tensor): Step size before bias and softplus, (batch, dim, L), dtype of ``u``.
        A (Tensor): State matrix (its diagonal), (dim, N) with 1 <= N <= 256, in the dtype of the state: float32, or
            float64 if ``u`` is float64.
        B (Tensor): Input matrix, (batch, K, N, L), dtype of ``u``; K divides dim.
        C (Tensor): Output matrix, (batch, K, N, L), dtype of ``u``.
        D (Tensor, optional): Skip connection, (dim,), dtype of the state.
        delta_bias (Tensor, optional): Added to ``delta``, (dim,), dtype of the state.
        delta_softplus (bool): Whether to apply softplus to ``delta`` after the bias. Default: False.
        out_dtype (torch.dtype, optional): float32 or the dtype of ``u`` (the default).
        return_last_state (bool): Whether to return the last state too. Default: False.
        check_finite (bool): Whether to look for NaN and infinity in A, D and delta_bias first; waits for the device.
            Default: False.
        backend (str, optional): ``naive``, ``cpu``, ``triton``, ``cuda`` or ``auto``. Default: see
            :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor | tuple[Tensor, Tensor]: Output (batch, dim, L) in ``out_dtype``; with ``return_last_state`` also
        :math:`h_L` (batch, dim, N) in the dtype of the state, through which no gradient flows.

    Raises:
        TypeError: If a dtype or a switch is wrong, or dtypes differ outside autocast.
        ValueError: If a shape, a device or ``out_dtype`` is wrong, or ``check_finite`` finds something.
        BackendError: If the backend asked for can't run.
    """
    op = 'selective_scan'
    for name, value, dims in (
        ('u', u, 'batch, dim, L'),
        ('delta', delta, 'batch, dim, L'),
        ('A', A, 'dim, N'),
        ('B', B, 'batch, groups, N, L'),
        ('C', C, 'batch, groups, N, L'),
    ):
        check_tensor(op, name, value, dims)
    for name, option in (('D', D), ('delta_bias', delta_bias)):
        if option is not None:
            check_tensor(op, name, option, 'dim')
    for name, switch in (
        ('delta_softplus', delta_softplus),
        ('return_last_state', return_last_state),
        ('check_finite', check_finite),
    ):
        check_flag(op, name, switch)
    tensors = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    check_same_device(op, 'u', tensors)
    if autocast_enabled(u.device.type):
        u, delta, B, C = promote((u, delta, B, C))
        state = state_dtype(u.dtype)
        A, D, delta_bias = (
            A.to(state),
            D if D is None else D.to(state),
            delta_bias if delta_bias is None else delta_bias.to(state),
        )
    check_same_dtype(op, 'u', dict(u=u, delta=delta, B=B, C=C))
    check_state_dtype(op, u, dict(A=A, D=D, delta_bias=delta_bias))
    _check_shapes(op, u, delta, A, B, C, D, delta_bias)
    out_dtype = check_out_dtype(op, out_dtype, u.dtype)
    if check_finite and u.device.type != 'meta':
        check_values(op, dict(A=A, D=D, delta_bias=delta_bias))

    training = records_gradients(*tensors.values())
    # the rule only asks whether N is 1, and L short or long; a traced program must not depend on L, maybe a symbol
    d_state = 1 if A.shape[1] == 1 else 2
    steps = 'medium' if torch.compiler.is_compiling() else classify_length(u.shape[2])
    backend = resolve(op, u.device.type, backend, training, d_state, u.dtype == torch.float64, steps)
    if backend == 'naive':
        out, last_state = naive.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype)
    else:
        run = torch.ops.mmvmamba.selective_scan_triton if backend == 'triton' else torch.ops.mmvmamba.selective_scan
        out, states = run(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype == torch.float32)
        last_state = states[:, :, -1]
    return (out, last_state.detach()) if return_last_state else out


def _check_shapes(op, u, delta, A, B, C, D, delta_bias):
    batch, dim, length = u.shape
    groups, d_state = B.shape[1], B.shape[2]
    check_shape(op, 'delta', delta, u.shape, 'the shape of u')
    check_shape(op, 'A', A, (dim, d_state), 'dim of u, N of B')
    if d_state > MAX_STATE:
        raise ValueError(f'{op}: B has {d_state} states (N), at most {MAX_STATE} are supported')
    if dim % groups:
        raise ValueError(f'{op}: B has {groups} groups but u has {dim} channels, which {groups} does not divide')
    check_shape(op, 'B', B, (batch, groups, d_state, length), 'batch and L of u')
    check_shape(op, 'C', C, B.shape, 'the shape of B')
    for name, value in (('D', D), ('delta_bias', delta_bias)):
        if value is not None:
            check_shape(op, name, value, (dim,), 'dim of u')
