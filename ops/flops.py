"""FLOPs of the compiled ops for torch's own counter, :class:`torch.utils.flop_counter.FlopCounterMode`.

That counter takes a multiply-add of a product or a convolution for two, and norms and activations for nothing; so do
these formulas.  A selective scan with skip connection counts 9 B L D N + B D L, as its authors count it; the scan of
Mamba-2 the products of its chunks of 64 steps; and backward twice what forward does.  The published tables count a
multiply-add once, see ``tools/analysis/get_flops.py``.  Of the naive backend torch counts the products, and nothing of
the recurrence.
"""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula


def selective_scan(u, delta, A, *_, **__) -> int:
    """FLOPs of a scan of (batch, dim, L), A (dim, N)."""
    return prod(u) * (9 * A[1] + 1)


def ss2d_scan(x, x_proj_weight, dt_projs_weight, *_, **__) -> int:
    """FLOPs of the two projections and the scan along K routes; x (B, D, H, W), dt_projs_weight (K, D, R)."""
    routes, _, dt_rank = dt_projs_weight
    d_state = (x_proj_weight[1] - dt_rank) // 2
    return routes * prod(x) * (2 * x_proj_weight[1] + 2 * dt_rank + 9 * d_state + 1)


def ssd_scan(x, dt, A, B, C, *_, **__) -> int:
    """FLOPs of C B^T of each group, and of three products and the skip connection of each head of P channels.

    x (batch, L, H, P), dt (batch, L, heads of all routes), B (batch, L, G, N).
    """
    steps, chunk, (groups, d_state) = B[0] * B[1], min(B[1], 64), B[2:]
    return steps * (2 * groups * chunk * d_state + dt[2] * x[3] * (2 * chunk + 4 * d_state + 1))


def linear(x, weight, *_, **__) -> int:
    """FLOPs of a product with a weight (C_out, C)."""
    return 2 * prod(x) * weight[0]


def mlp(x, weight1, bias1, weight2, *_, **__) -> int:
    """FLOPs of two products, with weights (hidden, C) and (C, hidden)."""
    return linear(x, weight1) + 2 * prod(x[:-1]) * prod(weight2)


def convolution(x, weight, *_, out_shape, **__) -> int:
    """FLOPs of a convolution with a weight (C_out, C_in / groups, ...), in any layout of the map."""
    return 2 * prod(out_shape) * prod(weight[1:])


def _register(op: str, formula, backward) -> None:
    for suffix in ('', '_triton'):
        for name, count in ((f'{op}{suffix}', formula), (f'{op}{suffix}_backward', backward)):
            if hasattr(torch.ops.mmvmamba, name):
                register_flop_formula(getattr(torch.ops.mmvmamba, name))(count)


def _twice(formula):
    """Backward of an op, which takes the gradient first and then what forward took."""
    return lambda dy, *arguments, **_: 2 * formula(*arguments, out_shape=dy)


def register_flops() -> None:
    """Register the formulas of all ops that are defined."""
    _register('selective_scan', selective_scan, _twice(selective_scan))
    _register('ss2d_scan', ss2d_scan, _twice(ss2d_scan))
    _register('ssd_scan', ssd_scan, lambda dout, dlast_state, *inputs, **_: 2 * ssd_scan(*inputs))
    _register('linear', linear, _twice(linear))
    _register('mlp', mlp, lambda dy, x, hidden, weight1, weight2, **_: 2 * mlp(x, weight1, None, weight2))
    _register('depthwise_conv_silu', convolution, _twice(convolution))
    _register('conv2d_channel_last', convolution, _convolution_backward)


def _convolution_backward(dy, x, weight, stride, padding, x_grad, *_, **__) -> int:
    return (1 + x_grad) * convolution(x, weight, out_shape=dy)  # an image needs no gradient
