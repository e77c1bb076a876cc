"""The cascade2d scan: rows in both directions, then columns in both directions of what the rows gave."""

import torch
import torch.nn.functional as F

from mmvmamba.ops import selective_scan


def cascade_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds) -> torch.Tensor:
    """Scan each row, then each column, as a sequence of its own; parameters as in :func:`mmvmamba.ops.ss2d_scan`.

    Routes 0 and 1 hold the parameters of the rows (forward, backward), routes 2 and 3 those of the columns.  Follows
    the published code: a parameter-free LayerNorm precedes each pass, and a pass adds its two directions step by step,
    without turning the reversed one back.

    Args:
        x (Tensor): (B, H, W, D).

    Returns:
        Tensor: (B, H, W, D), in the dtype of ``x``.
    """
    A_logs, Ds = A_logs.unflatten(0, (4, -1)), Ds.unflatten(0, (4, -1))
    for routes, transpose in ((slice(0, 2), False), (slice(2, 4), True)):
        x = F.layer_norm(x, x.shape[-1:])
        lines = x.transpose(1, 2) if transpose else x
        lines = _scan_lines(
            lines, x_proj_weight[routes], dt_projs_weight[routes], dt_projs_bias[routes], A_logs[routes], Ds[routes]
        )
        x = lines.transpose(1, 2) if transpose else lines
    return x


def _scan_lines(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds):
    """Scan every line x[b, i] of (B, lines, L, D) in both directions."""
    batch, lines, _, channels = x.shape
    dt_rank, d_state = dt_projs_weight.shape[2], A_logs.shape[2]
    u = x.flatten(0, 1).transpose(1, 2)  # (B * lines, D, L)
    u = torch.stack([u, u.flip(-1)], dim=1)
    maps = torch.matmul(x_proj_weight.to(u.dtype), u)
    dts, Bs, Cs = maps.to(u.dtype).split([dt_rank, d_state, d_state], dim=2)
    delta = torch.matmul(dt_projs_weight.to(u.dtype), dts)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    y = selective_scan(
        u.flatten(1, 2),
        delta.to(u.dtype).flatten(1, 2),
        -torch.exp(A_logs.flatten(0, 1).to(dtype)),
        Bs,
        Cs,
        Ds.flatten().to(dtype),
        dt_projs_bias.flatten().to(dtype),
        delta_softplus=True,
        out_dtype=dtype,
    )
    y = y.unflatten(1, (2, channels)).sum(dim=1).transpose(1, 2)
    return y.unflatten(0, (batch, lines)).to(x.dtype)
