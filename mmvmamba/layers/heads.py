"""The scan of Mamba-2 blocks: heads of channels, projections of all routes in one product."""

from typing import Any, Optional

import torch
import torch.nn.functional as F

from mmvmamba.ops import ssd_scan
from mmvmamba.ops.checks import state_dtype

from .convolution import autocast_dtype


def project_heads(x: torch.Tensor, x_proj_weight: torch.Tensor, Ds: torch.Tensor) -> tuple:
    """Project each pixel to the dt, B and C of all routes.

    Args:
        x (Tensor): (B, L, D).
        x_proj_weight (Tensor): (K, R + 2N, D), rows of a route in the order dt, B, C.
        Ds (Tensor): (K, R, P), for its shape.

    Returns:
        tuple[Tensor]: dt (B, L, K * R), B and C (B, L, K, N); views of one tensor.
    """
    routes, heads = Ds.shape[:2]
    d_state = (x_proj_weight.shape[1] - heads) // 2
    rows = x_proj_weight.split([heads, d_state, d_state], dim=1)
    maps = F.linear(x, torch.cat([part.flatten(0, 1) for part in rows]).to(x.dtype))
    dt, B, C = maps.split([routes * heads, routes * d_state, routes * d_state], dim=2)
    return dt, B.unflatten(2, (routes, d_state)), C.unflatten(2, (routes, d_state))


def scan_heads(
    x: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_projs_bias: torch.Tensor,
    A_logs: torch.Tensor,
    Ds: torch.Tensor,
    scan_mode: str,
    initial_state: Optional[torch.Tensor] = None,
) -> Any:
    """Scan a map along its four routes, each with R heads of P channels: :func:`mmvmamba.ops.ssd_scan` of its pixels.

    Args:
        x (Tensor): (B, H, W, D), D = R * P.
        x_proj_weight (Tensor): (4, R + 2N, D).
        dt_projs_bias (Tensor): (4, R).
        A_logs (Tensor): (4, R).
        Ds (Tensor): (4, R, P).
        scan_mode (str): ``cross2d``, ``unidi`` or ``bidi``.
        initial_state (Tensor, optional): (B, 4 R, P, N). Default: zeros.

    Returns:
        Tensor | tuple[Tensor, Tensor]: (B, H, W, D), in the dtype of ``x`` or of autocast; with ``initial_state`` also
        the last state.
    """
    size, heads = tuple(x.shape[1:3]), Ds.shape[1]
    x = x.flatten(1, 2).to(autocast_dtype(x))
    dt, B, C = project_heads(x, x_proj_weight, Ds)
    dtype = state_dtype(x.dtype)
    result = ssd_scan(
        x.unflatten(2, (heads, -1)),
        dt,
        -torch.exp(A_logs.to(dtype)).flatten(),
        B,
        C,
        Ds.to(dtype).flatten(0, 1),
        dt_projs_bias.to(dtype).flatten(),
        initial_state,
        dt_softplus=True,
        size=size,
        scan_mode=scan_mode,
        return_last_state=initial_state is not None,
    )
    if initial_state is None:
        return result.flatten(2).unflatten(1, size)
    return result[0].flatten(2).unflatten(1, size), result[1]
