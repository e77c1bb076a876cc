"""The public SS2D core: projections in, merged map out; documented function, argument checks, choice of backend."""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Optional

import torch

from ..backend import logger, resolve
from ..checks import autocast_enabled, check_out_dtype, check_same_device, check_shape, check_tensor, records_gradients
from ..cross_scan.interface import NUM_ROUTES, SCAN_MODES, check_scan_mode
from ..decisions import constant_when_compiled
from . import composed, registration

MOST_STATES = dict(cuda=16, triton=64)  # that the fused kernels take

_announced: set = set()
_composed: ContextVar = ContextVar('mmvmamba_composed', default=False)


@contextmanager
def use_composed():
    """Compose :func:`ss2d_scan` of the unfused ops inside the ``with`` block, on any backend: to compare the two."""
    token = _composed.set(True)
    try:
        yield
    finally:
        _composed.reset(token)


def ss2d_scan(
    x: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_projs_weight: torch.Tensor,
    dt_projs_bias: torch.Tensor,
    A_logs: torch.Tensor,
    Ds: torch.Tensor,
    scan_mode: str = 'cross2d',
    *,
    out_dtype: Optional[torch.dtype] = None,
    backend: Optional[str] = None,
) -> torch.Tensor:
    r"""2D selective scan, section 4.2 of `VMamba <https://arxiv.org/abs/2401.10166>`_: scan, select, merge.

    Along each of K = 4 routes of :func:`mmvmamba.ops.cross_scan`, every pixel x gives
    :math:`(dt, B, C) = W_x x` and :math:`\Delta = \mathrm{softplus}(W_{dt}\, dt + b)`; a
    :func:`mmvmamba.ops.selective_scan` with :math:`A = -\exp(A_{log})` runs along the route, and the four outputs are
    added at their pixels.

    Args:
        x (Tensor): Activated feature map, (B, D, H, W); ``channels_last`` memory is the fast layout.
        x_proj_weight (Tensor): :math:`W_x` of each route, (K, R + 2N, D), rows in the order dt, B, C.
        dt_projs_weight (Tensor): :math:`W_{dt}`, (K, D, R).
        dt_projs_bias (Tensor): :math:`b`, (K, D).
        A_logs (Tensor): :math:`A_{log}`, (K * D, N).
        Ds (Tensor): Skip connection, (K * D,).
        scan_mode (str): ``cross2d``, ``unidi`` or ``bidi``. Default: ``cross2d``.
        out_dtype (torch.dtype, optional): float32 or the dtype of ``x`` (the default).
        backend (str, optional): See :mod:`mmvmamba.ops.backend`.

    Returns:
        Tensor: Merged map (B, D, H, W) in ``out_dtype``. Parameters of any floating dtype are cast: the projections
        run in the dtype of ``x``, the scan and its state in float32 (float64 for a float64 ``x``).

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If a shape, a device, ``scan_mode`` or ``out_dtype`` is wrong.
        BackendError: If the backend asked for can't run.
    """
    op = 'ss2d_scan'
    parameters = dict(
        x_proj_weight=x_proj_weight, dt_projs_weight=dt_projs_weight, dt_projs_bias=dt_projs_bias, A_logs=A_logs, Ds=Ds
    )
    check_tensor(op, 'x', x, 'B, D, H, W')
    for (name, value), dims in zip(parameters.items(), ('K, R + 2N, D', 'K, D, R', 'K, D', 'K * D, N', 'K * D')):
        check_tensor(op, name, value, dims)
    check_same_device(op, 'x', dict(x=x, **parameters))
    check_scan_mode(op, scan_mode)
    if scan_mode == 'cascade2d':
        raise ValueError(
            f"{op}: scan_mode is 'cascade2d', which scans rows and columns one after the other; "
            'expected cross2d, unidi or bidi'
        )
    _check_shapes(op, x, **parameters)
    if autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out_dtype = check_out_dtype(op, out_dtype, x.dtype)

    training = records_gradients(x, *parameters.values())
    dt_rank, d_state = dt_projs_weight.shape[2], A_logs.shape[1]
    backend = resolve(op, x.device.type, backend, training, d_state, x.dtype == torch.float64)
    if backend != 'naive' and not _wants_composed() and _fits(x, dt_rank, d_state, backend):
        run = torch.ops.mmvmamba.ss2d_scan_triton if backend == 'triton' else torch.ops.mmvmamba.ss2d_scan
        weights = [t.float().contiguous() for t in parameters.values()]
        return run(x, *weights, SCAN_MODES.index(scan_mode), out_dtype == torch.float32, training)[0]
    return composed.ss2d_scan(
        x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, out_dtype, backend
    )


@constant_when_compiled
def _wants_composed() -> bool:
    return _composed.get()


def _fits(x: torch.Tensor, dt_rank: int, d_state: int, backend: str) -> bool:
    """Whether the fused kernels take this problem; what they don't is composed of the unfused ops, and said once."""
    if x.dtype == torch.float64:
        reason = 'x is float64'
    elif backend == 'cpu':
        return True
    elif d_state > MOST_STATES[backend]:
        reason = f'd_state is {d_state}, and the fused kernels take at most {MOST_STATES[backend]}'
    elif _too_large(x, dt_rank, d_state, backend):
        reason = 'an image of x has 2**29 elements or more, its channels padded as in the kernels'
    elif backend == 'triton' and registration.UNSUPPORTED:
        reason = registration.UNSUPPORTED
    else:
        return True
    _announce_composed(reason, backend)
    return False


def _too_large(x: torch.Tensor, dt_rank: int, d_state: int, backend: str) -> bool:
    """Whether an index into an image's four routes, of padded channels or of the projections, is none of 32 bits."""
    _, channels, height, width = x.shape
    if backend == 'cuda':
        widths = (registration.cuda_padded(channels), registration.cuda_columns(dt_rank, d_state))
    else:
        widths = (channels, registration.map_columns(dt_rank, d_state))
    return any(4 * height * width * columns >= 2**31 for columns in widths)


@constant_when_compiled
def _announce_composed(reason: str, backend: str) -> None:
    if (reason, backend) not in _announced:
        _announced.add((reason, backend))
        logger.info(f'ss2d_scan is composed of the unfused {backend} ops: {reason}')


def _check_shapes(op, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds):
    channels = x.shape[1]
    dt_rank, d_state = dt_projs_weight.shape[2], A_logs.shape[1]
    check_shape(op, 'dt_projs_weight', dt_projs_weight, (NUM_ROUTES, channels, dt_rank), 'K = 4 routes, D of x, R')
    check_shape(op, 'dt_projs_bias', dt_projs_bias, (NUM_ROUTES, channels), 'K = 4 routes, D of x')
    check_shape(op, 'A_logs', A_logs, (NUM_ROUTES * channels, d_state), 'K * D of x, N')
    check_shape(op, 'Ds', Ds, (NUM_ROUTES * channels,), 'K * D of x')
    check_shape(
        op,
        'x_proj_weight',
        x_proj_weight,
        (NUM_ROUTES, dt_rank + 2 * d_state, channels),
        'K = 4 routes, R of dt_projs_weight + 2 N of A_logs, D of x',
    )
