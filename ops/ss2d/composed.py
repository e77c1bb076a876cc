"""The SS2D core composed of the public ops: the equations of the paper one after the other, on any backend."""

import torch

from ..checks import state_dtype
from ..cross_scan.interface import cross_merge, cross_scan
from ..selective_scan.interface import selective_scan


def ss2d_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, out_dtype, backend):
    """Scan a map along four routes; arguments as in :func:`mmvmamba.ops.ss2d_scan`.

    Moves the four scanned copies of x, the (B, K*D, L) delta and the four outputs through memory; the fused backends
    do without them.
    """
    _batch, channels, height, width = x.shape
    dt_rank, d_state = dt_projs_weight.shape[2], A_logs.shape[1]
    dtype = state_dtype(x.dtype)

    xs = cross_scan(x, scan_mode, backend=backend)  # (B, K, D, L)
    projections = torch.matmul(x_proj_weight.to(x.dtype), xs)  # (B, K, R + 2N, L)
    dts, Bs, Cs = projections.split([dt_rank, d_state, d_state], dim=2)
    delta = torch.matmul(dt_projs_weight.to(x.dtype), dts)  # (B, K, D, L)
    ys = selective_scan(
        xs.flatten(1, 2),
        delta.flatten(1, 2),
        -torch.exp(A_logs.to(dtype)),
        Bs,
        Cs,
        Ds.to(dtype),
        dt_projs_bias.to(dtype).flatten(),
        delta_softplus=True,
        out_dtype=dtype,
        backend=backend,
    )
    y = cross_merge(ys.unflatten(1, (-1, channels)), (height, width), scan_mode, backend=backend)
    return y.to(out_dtype)
