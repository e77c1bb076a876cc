"""The public scan of Mamba-2: documented function, argument checks, choice of backend."""

from typing import Any, Optional

import torch

from ..backend import resolve
from ..checks import (
    MAX_STATE,
    autocast_enabled,
    check_flag,
    check_map_size,
    check_out_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_state_dtype,
    check_tensor,
    promote,
    records_gradients,
    state_dtype,
)
from ..cross_scan.interface import NUM_ROUTES, SCAN_MODES, check_scan_mode
from . import naive, registration, routes  # noqa: F401 (registration defines the op)

MAX_CHANNELS = 256


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional[torch.Tensor] = None,
    dt_bias: Optional[torch.Tensor] = None,
    initial_state: Optional[torch.Tensor] = None,
    dt_softplus: bool = False,
    *,
    size: Optional[tuple] = None,
    scan_mode: str = 'cross2d',
    out_dtype: Optional[torch.dtype] = None,
    return_last_state: bool = False,
    backend: Optional[str] = None,
) -> Any:
    r"""State-space scan of `Mamba-2 <https://arxiv.org/abs/2405.21060>`_, whose decay is one number a head and step.

    .. math::
        h_t = \exp(A\, dt_t)\, h_{t-1} + dt_t\, x_t B_t^\top, \qquad y_t = h_t C_t + D \circ x_t

    for each of H heads of P channels, with a state of P x N numbers.  Heads come in G groups of equal size, which share
    B and C.  The compiled backends compute it as matrix products of chunks of 64 steps, in Triton 32 (section 6 of the
    paper).

    With ``size``, the L steps are the pixels of a map, row by row, and are scanned along the K = 4 routes of
    :func:`mmvmamba.ops.cross_scan`: x is one for all routes; the heads of dt, A, D and the states, and the groups of B
    and C, are those of route 0, 1, 2, 3; and the four outputs are added at their pixels.  Everything stays in the order
    of the pixels: on a GPU no route is laid out in memory.

    Args:
        x (Tensor): Input, (batch, L, H, P), or (batch, L, H / K, P) with ``size``; float32, float16, bfloat16 or
            float64. P is at most 256.
        dt (Tensor): Step size before bias and softplus, (batch, L, H), dtype of ``x``.
        A (Tensor): Decay rate of each head, negative as a rule, (H,), in the dtype of the state: float32, or float64 if
            ``x`` is float64.
        B (Tensor): Input matrix, (batch, L, G, N), dtype of ``x``, 1 <= N <= 256; G divides H, and is K with ``size``.
        C (Tensor): Output matrix, (batch, L, G, N), dtype of ``x``.
        D (Tensor, optional): Skip connection, (H, P), dtype of the state.
        dt_bias (Tensor, optional): Added to ``dt``, (H,), dtype of the state.
        initial_state (Tensor, optional): :math:`h_0`, (batch, H, P, N), dtype of the state. Default: zeros.
        dt_softplus (bool): Whether to apply softplus to ``dt`` after the bias. Default: False.
        size (tuple[int], optional): (H, W) of the map whose pixels the steps are, with H * W = L. Default: None.
        scan_mode (str): ``cross2d``, ``unidi`` or ``bidi``, with ``size``. Default: ``cross2d``.
        out_dtype (torch.dtype, optional): float32 or the dtype of ``x`` (the default).
        return_last_state (bool): Whether to return the last state too. Default: False.
        backend (str, optional): ``naive``, ``cpu``, ``triton`` or ``auto``. Default: see :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor | tuple[Tensor, Tensor]: Output in the shape of ``x`` and in ``out_dtype``; with ``return_last_state``
        also :math:`h_L`, (batch, H, P, N) in the dtype of the state, which has a gradient.

    Raises:
        TypeError: If a dtype or a switch is wrong, or dtypes differ outside autocast.
        ValueError: If a shape, a device, ``size``, ``scan_mode`` or ``out_dtype`` is wrong.
        BackendError: If the backend asked for can't run.

    Note:
        On a GPU the products of float16 and bfloat16 inputs round their operands to 11 and 8 bits, as tensor cores do,
        and add in float32; those of float32 have all of its digits unless
        ``torch.set_float32_matmul_precision`` gives TF32 leave.  A value that is not
        finite can reach all steps of its chunk.
    """
    op = 'ssd_scan'
    shared = dict(x=x, dt=dt, B=B, C=C)
    weights: dict[str, Any] = dict(A=A, D=D, dt_bias=dt_bias, initial_state=initial_state)
    dims = dict(x='batch, L, H, P', dt='batch, L, H', B='batch, L, G, N', C='batch, L, G, N')
    dims.update(A='H', D='H, P', dt_bias='H', initial_state='batch, H, P, N')
    for name, value in (*shared.items(), *weights.items()):
        if value is not None or name in ('x', 'dt', 'A', 'B', 'C'):
            check_tensor(op, name, value, dims[name])
    check_flag(op, 'dt_softplus', dt_softplus)
    check_flag(op, 'return_last_state', return_last_state)
    check_same_device(op, 'x', {**shared, **weights})
    if autocast_enabled(x.device.type):
        x, dt, B, C = promote((x, dt, B, C))
        dtype = state_dtype(x.dtype)
        weights = {name: None if value is None else value.to(dtype) for name, value in weights.items()}
    A, D, dt_bias, initial_state = weights.values()
    check_same_dtype(op, 'x', dict(x=x, dt=dt, B=B, C=C))
    check_state_dtype(op, x, weights)
    _check_size(op, size, scan_mode, x)
    _check_shapes(op, x, dt, B, C, weights, NUM_ROUTES if size else 1)
    out_dtype = check_out_dtype(op, out_dtype, x.dtype)

    training = records_gradients(x, dt, B, C, *weights.values())
    backend = resolve(op, x.device.type, backend, training, double=x.dtype == torch.float64)
    if backend == 'naive':
        xs, dts, Bs, Cs = routes.scan_inputs(x, dt, B, C, size, scan_mode) if size else (x, dt, B, C)
        out, last = naive.ssd_scan(xs, dts, A, Bs, Cs, D, dt_bias, initial_state, dt_softplus)
        out = (routes.merge(out, size, scan_mode) if size else out).to(out_dtype)
    else:
        run = torch.ops.mmvmamba.ssd_scan_triton if backend == 'triton' else torch.ops.mmvmamba.ssd_scan
        route = (*size, SCAN_MODES.index(scan_mode)) if size else (0, 0, -1)
        float_output = out_dtype == torch.float32
        out, last = run(
            x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, float_output, return_last_state, *route
        )  # fmt: skip
    return (out, last) if return_last_state else out


def _check_size(op: str, size, scan_mode, x: torch.Tensor) -> None:
    check_scan_mode(op, scan_mode)
    if scan_mode == 'cascade2d':
        raise ValueError(f"{op}: scan_mode is 'cascade2d', expected cross2d, unidi or bidi")
    if size is None:
        return
    check_map_size(op, size)
    if size[0] * size[1] != x.shape[1]:
        raise ValueError(f'{op}: size is {tuple(size)}, expected a map of the {x.shape[1]} steps of x')


def _check_shapes(op: str, x, dt, B, C, weights: dict, routes: int) -> None:
    batch, length, heads, channels = x.shape
    heads, (groups, d_state) = routes * heads, B.shape[2:]
    why = 'batch, L of x; its heads' + (f' in {routes} routes' if routes > 1 else '')
    check_shape(op, 'dt', dt, (batch, length, heads), why)
    if routes > 1:
        check_shape(op, 'B', B, (batch, length, routes, d_state), f'batch and L of x, {routes} routes')
    check_shape(op, 'B', B, (batch, length, groups, d_state), 'batch and L of x')
    check_shape(op, 'C', C, B.shape, 'the shape of B')
    if heads % groups:
        raise ValueError(f'{op}: B has {groups} groups but dt has {heads} heads, which {groups} does not divide')
    if d_state > MAX_STATE:
        raise ValueError(f'{op}: B has {d_state} states (N), at most {MAX_STATE} are supported')
    if channels > MAX_CHANNELS:
        raise ValueError(f'{op}: x has {channels} channels a head (P), at most {MAX_CHANNELS} are supported')
    expected = dict(
        A=((heads,), 'heads of dt'),
        D=((heads, channels), 'heads of dt, P of x'),
        dt_bias=((heads,), 'heads of dt'),
        initial_state=((batch, heads, channels, d_state), 'batch of x, heads of dt, P of x, N of B'),
    )
    for name, value in weights.items():
        if value is not None:
            check_shape(op, name, value, *expected[name])
