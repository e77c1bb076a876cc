"""The Python functions of mamba_ssm's ``selective_scan_interface``, and those that Vim's copies of it add."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from mmvmamba.ops import selective_scan
from mmvmamba.ops.checks import check_tensor, state_dtype

from .conv import check as check_convolution
from .conv import forward as convolve

WAY_OUT = 'install the original mamba_ssm for it'


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
) -> Any:  # fmt: skip
    """Selective scan in mamba_ssm's order of arguments; see :func:`mmvmamba.ops.selective_scan`.

    Args:
        u (Tensor): (batch, dim, L).
        delta (Tensor): (batch, dim, L).
        A (Tensor): (dim, N), real.
        B, C (Tensor): (batch, N, L), (batch, K, N, L), or constant over time (dim, N).
        D (Tensor, optional): (dim,). Default: None.
        z (Tensor, optional): Gate, (batch, dim, L). Default: None.
        delta_bias (Tensor, optional): (dim,). Default: None.
        delta_softplus (bool): Whether to apply softplus to ``delta`` after the bias. Default: False.
        return_last_state (bool): Whether to return the last state too. Default: False.

    Returns:
        Tensor | tuple[Tensor, Tensor]: Output (batch, dim, L) in the dtype of ``u``, and if asked for the last state
        (batch, dim, N).

    Raises:
        NotImplementedError: If A is complex.
        TypeError, ValueError: As in :func:`mmvmamba.ops.selective_scan`.
    """
    refuse_complex('selective_scan_fn', A)
    softplus, last = bool(delta_softplus), bool(return_last_state)  # some callers pass None
    return selective_scan(u, delta, A, B, C, D, delta_bias, softplus, z=z, return_last_state=last)


def selective_scan_ref(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
) -> Any:  # fmt: skip
    """:func:`selective_scan_fn` by a Python loop over time, in float32: the reference, in mixed dtypes too."""
    refuse_complex('selective_scan_ref', A)
    dtype = state_dtype(u.dtype)
    y_type = u.dtype
    u, delta, A, B, C, D, delta_bias = (None if t is None else t.to(dtype) for t in (u, delta, A, B, C, D, delta_bias))
    with torch.autocast(u.device.type, enabled=False):
        y, last_state = selective_scan(
            u, delta, A, B, C, D, delta_bias, bool(delta_softplus), z=z, return_last_state=True, backend='naive'
        )  # fmt: skip
    return (y.to(y_type), last_state) if return_last_state else y.to(y_type)


def vmamba_scan_fn(
    u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, return_last_state=False, nrows=1, backnrows=-1
) -> Any:  # fmt: skip
    """:func:`selective_scan_fn` in the order of VMamba's package ``selective_scan``; the last two mean nothing here."""
    return selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus, return_last_state)


def vmamba_scan_ref(
    u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, return_last_state=False
) -> Any:  # fmt: skip
    """:func:`selective_scan_ref` in the order of VMamba's package ``selective_scan``."""
    return selective_scan_ref(u, delta, A, B, C, D, None, delta_bias, delta_softplus, return_last_state)


def mamba_inner_fn_no_out_proj(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight,
    A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
):  # fmt: skip
    """Mamba's mixer between its two outer projections: convolution, inner projections, gated scan.

    Args:
        xz (Tensor): Input and gate, (batch, 2 dim, L).
        conv1d_weight (Tensor): (dim, 1, width).
        conv1d_bias (Tensor, optional): (dim,).
        x_proj_weight (Tensor): Rows of dt, B and C, as far as B and C are not given: (R + 2N, dim).
        delta_proj_weight (Tensor): (dim, R).
        A (Tensor): (dim, N), real.
        B, C (Tensor, optional): As in :func:`selective_scan_fn`; None takes them from the projection. Default: None.
        D, delta_bias (Tensor, optional): (dim,). Default: None.
        B_proj_bias, C_proj_bias (Tensor, optional): Added to the projection, (N,). Default: None.
        delta_softplus (bool): Whether to apply softplus to the step sizes. Default: True.

    Returns:
        Tensor: Gated output (batch, dim, L).
    """
    u, z, delta, B, C = _project(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )  # fmt: skip
    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def mamba_inner_fn(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
    A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
    checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    """:func:`mamba_inner_fn_no_out_proj` with the outer projection.

    Args:
        out_proj_weight (Tensor): (d_model, dim).
        out_proj_bias (Tensor, optional): (d_model,).
        checkpoint_lvl (int): A choice of the original's memory, which means nothing here.
        b_rms_weight, c_rms_weight, dt_rms_weight (None): Refused otherwise.
        b_c_dt_rms_eps (float): Of those.
        others: As in :func:`mamba_inner_fn_no_out_proj`.

    Returns:
        Tensor: (batch, L, d_model).

    Raises:
        NotImplementedError: If an rms weight is given, or A is complex.
    """
    for name, value in (
        ('b_rms_weight', b_rms_weight), ('c_rms_weight', c_rms_weight), ('dt_rms_weight', dt_rms_weight)
    ):  # fmt: skip
        if value is not None:
            raise NotImplementedError(f'mamba_inner_fn: {name} has no stand-in, expected None; {WAY_OUT}')
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight,
        A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    )  # fmt: skip
    return _project_out(y, out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
    A, A_b, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
):  # fmt: skip
    """:func:`mamba_inner_fn` with a second scan, from the last step to the first by ``A_b``, which is added."""
    refuse_complex('bimamba_inner_fn', A_b)
    u, z, delta, B, C = _project(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )  # fmt: skip
    y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    u, z, delta, B, C = (t.flip(-1) if t.dim() > 2 else t for t in (u, z, delta, B, C))
    y_b = selective_scan_fn(u, delta, A_b, B, C, D, z, delta_bias, delta_softplus)
    return _project_out(y + y_b.flip(-1), out_proj_weight, out_proj_bias)


def refuse_complex(name, A) -> None:
    """Refuse a complex A."""
    if isinstance(A, torch.Tensor) and A.is_complex():
        raise NotImplementedError(
            f'{name}: A is complex, and the scan is for real A; take real A, as the layers of mamba_ssm do, or '
            f'{WAY_OUT}'
        )


def original_name(name) -> Any:
    """What else callers take from the original module, because it imports it: compiled modules, and einops."""
    if name in ('selective_scan_cuda', 'causal_conv1d_cuda'):
        return importlib.import_module(name)
    if name in ('rearrange', 'repeat'):
        return getattr(importlib.import_module('einops'), name)
    raise AttributeError(f'mamba_ssm.ops.selective_scan_interface, as mmvmamba provides it, has no {name!r}; {WAY_OUT}')


def _project(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
):  # fmt: skip
    """Input, gate, step sizes, B and C of the scan."""
    refuse_complex('mamba_inner_fn', A)
    check_tensor('mamba_inner_fn', 'xz', xz, 'batch, 2 dim, L')
    d_state, dt_rank = A.shape[1], delta_proj_weight.shape[1]
    x, z = xz.chunk(2, dim=1)
    check_convolution('mamba_inner_fn', x, conv1d_weight.flatten(1), conv1d_bias)
    u = convolve(x, conv1d_weight.flatten(1), conv1d_bias, True)
    rows = F.linear(u.mT, x_proj_weight).mT  # (batch, R + 2N, L)
    delta = torch.matmul(delta_proj_weight, rows[:, :dt_rank])
    if B is None:
        B = _with_bias(rows[:, dt_rank : dt_rank + d_state], B_proj_bias)
    if C is None:
        C = _with_bias(rows[:, rows.shape[1] - d_state :], C_proj_bias)
    return u, z, delta, B, C


def _with_bias(rows, bias):
    return rows if bias is None else rows + bias.to(rows.dtype)[:, None]


def _project_out(y, weight, bias):
    return F.linear(y.mT, weight, bias)
