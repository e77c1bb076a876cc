"""Initial values of the state-space parameters."""

import math

import torch
from torch import nn

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


def init_ssm(ssm_init: str, routes: int, d_inner: int, d_state: int, dt_rank: int) -> dict:
    """Make the parameters A_logs, Ds, dt_projs_weight and dt_projs_bias of SS2D.

    Args:
        ssm_init (str): ``mamba`` (S4D-real A, steps log-uniform in [1e-3, 1e-1], as in section 3.6 of
            `Mamba <https://arxiv.org/abs/2312.00752>`_), ``randn`` or ``zeros`` (of A_logs).
        routes (int): K.
        d_inner (int): Channels D of the scan.
        d_state (int): N.
        dt_rank (int): R.

    Returns:
        dict[str, Parameter]: ``A_logs`` (K*D, N), ``Ds`` (K*D,), ``dt_projs_weight`` (K, D, R), ``dt_projs_bias``
        (K, D).
    """
    state, weight, bias = (routes * d_inner, d_state), (routes, d_inner, dt_rank), (routes, d_inner)
    if ssm_init == 'mamba':
        A_logs = torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(routes * d_inner, 1)
        bound = dt_rank**-0.5
        dt_projs_weight = torch.empty(weight).uniform_(-bound, bound)
        dt_projs_bias = draw_steps(bias)
    elif ssm_init == 'randn':
        A_logs = torch.randn(state)
        dt_projs_weight, dt_projs_bias = 0.1 * torch.randn(weight), 0.1 * torch.randn(bias)
    else:
        A_logs = torch.zeros(state)
        dt_projs_weight, dt_projs_bias = 0.1 * torch.rand(weight), 0.1 * torch.rand(bias)
    parameters = dict(
        A_logs=A_logs, Ds=torch.ones(routes * d_inner), dt_projs_weight=dt_projs_weight, dt_projs_bias=dt_projs_bias
    )
    return {name: nn.Parameter(value) for name, value in parameters.items()}


def init_ssd(ssm_init: str, routes: int, heads: int, channels: int) -> dict:
    """Make the parameters A_logs, Ds and dt_projs_bias of SS2D with core ``ssd``.

    Args:
        ssm_init (str): ``mamba`` (that of `Mamba-2 <https://arxiv.org/abs/2405.21060>`_: A uniform in [1, 16], steps
            log-uniform in [1e-3, 1e-1]), ``randn`` or ``zeros`` (of A_logs).
        routes (int): K.
        heads (int): R.
        channels (int): P, of a head.

    Returns:
        dict[str, Parameter]: ``A_logs`` (K, R), ``Ds`` (K, R, P), ``dt_projs_bias`` (K, R).
    """
    shape = routes, heads
    if ssm_init == 'mamba':
        A_logs, dt_projs_bias = torch.empty(shape).uniform_(1, 16).log(), draw_steps(shape)
    elif ssm_init == 'randn':
        A_logs, dt_projs_bias = torch.randn(shape), 0.1 * torch.randn(shape)
    else:
        A_logs, dt_projs_bias = torch.zeros(shape), 0.1 * torch.rand(shape)
    parameters = dict(A_logs=A_logs, Ds=torch.ones(*shape, channels), dt_projs_bias=dt_projs_bias)
    return {name: nn.Parameter(value) for name, value in parameters.items()}


def draw_steps(
    shape: tuple, dt_min: float = DT_MIN, dt_max: float = DT_MAX, dt_floor: float = DT_FLOOR
) -> torch.Tensor:
    """Biases of a shape, which softplus makes to steps, log-uniform from ``dt_min`` to ``dt_max``."""
    dt = torch.empty(shape).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=dt_floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
