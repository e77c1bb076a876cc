"""The selective scan in pure PyTorch without a loop over all of time: what a user would write without a compiler.

Two formulations of the recurrence h_t = a_t h_{t-1} + b_t for N = 1, both with the adjoint recurrence as gradient.
"""

import torch
import torch.nn.functional as F


def chunked(a: torch.Tensor, b: torch.Tensor, steps: int = 56) -> torch.Tensor:
    """All states of (..., L): every chunk of ``steps`` advances at once, then the chunks' ends are chained."""
    length = a.shape[-1]
    padding = -length % steps
    a, b = (F.pad(x, (0, padding)).unflatten(-1, (-1, steps)) for x in (a, b))
    a, b = (x.movedim(-1, 0).contiguous() for x in (a, b))  # (steps, ..., chunks): a step is one stretch of memory
    for t in range(1, steps):
        torch.addcmul(b[t], a[t], b[t - 1], out=b[t])
        a[t].mul_(a[t - 1])
    states = [torch.zeros_like(b[-1, ..., 0])]
    for chunk in range(a.shape[-1] - 1):
        states.append(torch.addcmul(b[-1, ..., chunk], a[-1, ..., chunk], states[-1]))
    b.addcmul_(a, torch.stack(states, dim=-1))
    return b.movedim(0, -1).flatten(-2)[..., :length]


def log_step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """All states of (..., L) by doubling: after pass i, a state holds the last 2^i steps."""
    a, b, shift = a.clone(), b.clone(), 1
    while shift < a.shape[-1]:
        b[..., shift:] = torch.addcmul(b[..., shift:], a[..., shift:], b[..., :-shift])
        a[..., shift:] = a[..., shift:] * a[..., :-shift]
        shift *= 2
    return b


FORMULATIONS = {'chunked': chunked, 'log_step': log_step}


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, solve):
        h = solve(a, b)
        ctx.save_for_backward(a, h)
        ctx.solve = solve
        return h

    @staticmethod
    def backward(ctx, dh):
        a, h = ctx.saved_tensors
        # g_t = dh_t + a_{t+1} g_{t+1}, solved with time reversed
        g = ctx.solve(F.pad(a[..., 1:], (0, 1)).flip(-1), dh.flip(-1)).flip(-1)
        return g * F.pad(h[..., :-1], (1, 0)), g, None


def selective_scan(u, delta, A, B, C, D, delta_bias, formulation: str):
    """As :func:`mmvmamba.ops.selective_scan` with softplus, for N = 1 in float32.

    Args:
        formulation (str): ``chunked`` or ``log_step``.
    """
    groups = B.shape[1]
    u, delta = (x.unflatten(1, (groups, -1)) for x in (u, delta))  # (batch, groups, channels, L)
    A, D, delta_bias = (x.view(groups, -1, 1) for x in (A, D, delta_bias))
    delta = F.softplus(delta + delta_bias)
    h = _Recurrence.apply(torch.exp(delta * A), delta * u * B, FORMULATIONS[formulation])
    return torch.addcmul(h * C, D, u).flatten(1, 2)
