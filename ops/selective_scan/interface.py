"""The public selective scan: documented function, argument checks, choice of backend."""

from typing import Any, Optional

import torch

from ..backend import classify_length, resolve
from ..checks import (
    autocast_enabled,
    check_flag,
    check_out_dtype,
    check_same_device,
    check_same_dtype,
    check_state_dtype,
    check_values,
    promote,
    records_gradients,
    state_dtype,
)
from . import forms, naive, registration  # noqa: F401 (which defines the op)
from .arguments import check_shapes, check_tensors


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: Optional[torch.Tensor],
    D: Optional[torch.Tensor] = None,
    delta_bias: Optional[torch.Tensor] = None,
    delta_softplus: bool = False,
    *,
    z: Optional[torch.Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
    return_last_state: bool = False,
    check_finite: bool = False,
    backend: Optional[str] = None,
) -> Any:
    r"""Selective scan (S6) of `Mamba <https://arxiv.org/abs/2312.00752>`_, equations 2a, 2b and algorithm 2.

    .. math::
        h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t u_t, \qquad y_t = C_t^\top h_t + D u_t

    with :math:`h_0 = 0`.  Channels come in K groups of equal size; the channels of a group share B and C.  With a gate
    the output is :math:`y_t\, \mathrm{silu}(z_t)`; without C it is the states :math:`h_t` themselves.

    Args:
        u (Tensor): Input, (batch, dim, L), float32, float16, bfloat16 or float64.
        delta (Tensor): Step size before bias and softplus, (batch, dim, L), dtype of ``u``; or (batch, dim / r, L), of
            which r channels that follow each other share one.
        A (Tensor): State matrix (its diagonal), (dim, N) with 1 <= N <= 256, in the dtype of the state: float32, or
            float64 if ``u`` is float64.
        B (Tensor): Input matrix, (batch, K, N, L), dtype of ``u``; K divides dim.  (batch, N, L) means K = 1.
            Constant over time it is (dim, N), in the dtype of the state.
        C (Tensor, optional): Output matrix, in one of the forms of B.  None gives the states as output, and goes with
            neither D nor z.
        D (Tensor, optional): Skip connection, (dim,), dtype of the state.
        delta_bias (Tensor, optional): Added to ``delta``, (dim,), dtype of the state.
        delta_softplus (bool): Whether to apply softplus to ``delta`` after the bias. Default: False.
        z (Tensor, optional): Gate, (batch, dim, L), floating point; the product is computed in the dtype of the state.
        out_dtype (torch.dtype, optional): float32 or the dtype of ``u`` (the default).
        return_last_state (bool): Whether to return the last state too. Default: False.
        check_finite (bool): Whether to look for NaN and infinity in A, D and delta_bias first; waits for the device.
            Default: False.
        backend (str, optional): ``naive``, ``cpu``, ``triton``, ``cuda`` or ``auto``. Default: see
            :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor | tuple[Tensor, Tensor]: Output (batch, dim, L), or without C the states (batch, dim, N, L), in
        ``out_dtype``; with ``return_last_state`` also
        :math:`h_L` (batch, dim, N) in the dtype of the state, through which no gradient flows.

    Raises:
        TypeError: If a dtype or a switch is wrong, or dtypes differ outside autocast.
        ValueError: If a shape, a device or ``out_dtype`` is wrong, or ``check_finite`` finds something.
        BackendError: If the backend asked for can't run.
    """
    op = 'selective_scan'
    check_tensors(op, u, delta, A, B, C, D, delta_bias, z)
    for name, switch in (
        ('delta_softplus', delta_softplus),
        ('return_last_state', return_last_state),
        ('check_finite', check_finite),
    ):
        check_flag(op, name, switch)
    tensors: dict = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias, z=z)
    check_same_device(op, 'u', tensors)
    # of B and C, those that are constant over time are weights
    weights, moving = dict(A=A, D=D, delta_bias=delta_bias), dict(u=u, delta=delta)
    (weights if B.dim() == 2 else moving)['B'] = B
    if C is not None:
        (weights if C.dim() == 2 else moving)['C'] = C
    if autocast_enabled(u.device.type):
        moving = dict(zip(moving, promote(tuple(moving.values()))))
        state = state_dtype(moving['u'].dtype)
        weights = {name: None if t is None else t.to(state) for name, t in weights.items()}
        tensors = {**tensors, **weights, **moving}
        u, delta, A, B, C, D, delta_bias, z = tensors.values()
    check_same_dtype(op, 'u', moving)
    check_state_dtype(op, u, weights)
    check_shapes(op, u, delta, A, B, C, D, delta_bias, z)
    out_dtype = check_out_dtype(op, out_dtype, u.dtype)
    if check_finite and u.device.type != 'meta':
        check_values(op, dict(A=A, D=D, delta_bias=delta_bias))

    training = records_gradients(*tensors.values())
    # the rule only asks whether N is 1, and L short or long; a traced program must not depend on L, maybe a symbol
    d_state = 1 if A.shape[1] == 1 else 2
    steps = 'medium' if torch.compiler.is_compiling() else classify_length(u.shape[2])
    backend = resolve(op, u.device.type, backend, training, d_state, u.dtype == torch.float64, steps)
    if backend == 'naive':
        out, last_state = naive.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype, z)
        return (out, last_state.detach()) if return_last_state else out
    if len(weights) > 3:  # whose digits are not rounded to those of u
        u, delta, B = (t.to(A.dtype) for t in (u, delta, B))
        C = None if C is None else C.to(A.dtype)
    if delta.shape[1] != u.shape[1] or B.dim() != 4 or (C is not None and C.dim() != 4):
        delta = forms.per_channel(delta, u)
        B, C = forms.per_group(B, C, u)
    run = torch.ops.mmvmamba.selective_scan_triton if backend == 'triton' else torch.ops.mmvmamba.selective_scan
    float_output = out_dtype == torch.float32 or (z is not None and out_dtype != torch.float64)
    if C is None:
        *channels, bias = forms.one_state_each(u, delta, A, B, delta_bias)
        out, states = run(*channels, None, bias, delta_softplus, float_output)
        out = forms.states_of(out, *B.shape[1:3])
        last_state = forms.states_of(states[:, :, -1], *B.shape[1:3]).squeeze(3)
    else:
        out, states = run(u, delta, A, B, C, D, delta_bias, delta_softplus, float_output)
        last_state = states[:, :, -1]
    if z is not None:
        out = forms.gate(out, z, out_dtype)
    elif out.dtype != out_dtype:
        out = out.to(out_dtype)
    return (out, last_state.detach()) if return_last_state else out
