"""The selective scan as written in the paper, one step after the other: the truth the other backends are held to."""

import torch
import torch.nn.functional as F

from ..checks import state_dtype

EXACT = 40.0  # from here on softplus is its argument to float64's last bit; PyTorch's own 20 is off by 2e-9


def selective_scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, out_dtype=None, z=None):
    """Selective scan by a Python loop over time; differentiable by autograd, also in float64.

    Arguments as in :func:`mmvmamba.ops.selective_scan`.

    Returns:
        tuple[Tensor, Tensor]: ``out`` (batch, dim, L), or without C the states (batch, dim, N, L); and the last state
        (batch, dim, N).
    """
    dtype = state_dtype(u.dtype)
    out_dtype = out_dtype or u.dtype
    decay, drive, u = _decay_and_drive(u, delta, A, B, delta_bias, delta_softplus, dtype)
    h = torch.zeros_like(drive[..., 0])
    states = []
    for decay_t, drive_t in zip(decay.unbind(-1), drive.unbind(-1)):
        h = decay_t * h + drive_t
        states.append(h)
    h_all = torch.stack(states, dim=-1)
    if C is None:
        return h_all.to(out_dtype), h
    y = (h_all * _per_channel(C, u).to(dtype)).sum(dim=2)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype), h


def selective_scan_backward(dout, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
    """Gradients of :func:`selective_scan` without z, by the adjoint recurrence and without autograd.

    .. math::
        s_t = C_t\\, dy_t + \\exp(\\Delta_{t+1} A)\\, s_{t+1}

    is the gradient of :math:`h_t`, from which all others follow.

    Args:
        dout (Tensor): Gradient of the output, (batch, dim, L).
        u, delta, A, B, C, D, delta_bias, delta_softplus: As in forward; B and C are (batch, K, N, L), delta is
            (batch, dim, L).

    Returns:
        tuple[Tensor]: Gradients of u, delta, A, B, C, D and delta_bias; the last two are empty where there is none.
    """
    dtype = state_dtype(u.dtype)
    decay, drive, x = _decay_and_drive(u, delta, A, B, delta_bias, delta_softplus, dtype)
    dt, slope = _steps(delta.to(dtype), delta_bias, delta_softplus)
    dy, B_, C_ = dout.to(dtype), _per_channel(B, u).to(dtype), _per_channel(C, u).to(dtype)
    h = torch.zeros_like(drive[..., 0])
    before, after = [], []
    for decay_t, drive_t in zip(decay.unbind(-1), drive.unbind(-1)):
        before.append(h)
        h = decay_t * h + drive_t
        after.append(h)
    flows, flow = [], torch.zeros_like(h)
    for decay_t, source_t in zip(reversed(decay.unbind(-1)), reversed((C_ * dy.unsqueeze(2)).unbind(-1))):
        flows.append(source_t + flow)
        flow = decay_t * flows[-1]
    s = torch.stack(flows[::-1], dim=-1)
    ddecay = s * torch.stack(before, dim=-1) * decay
    sB = (s * B_).sum(2)
    ddelta = slope * (sB * x + (ddecay * A.unsqueeze(-1)).sum(2))
    du = sB * dt
    if D is not None:
        du = du + D[:, None] * dy

    def over_group(gradient):  # (batch, dim, N, L) to the shape of B
        return gradient.unflatten(1, (B.shape[1], -1)).sum(2).to(B.dtype)

    return (
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        (ddecay * dt.unsqueeze(2)).sum((0, 3)),
        over_group(s * (dt * x).unsqueeze(2)),
        over_group(torch.stack(after, dim=-1) * dy.unsqueeze(2)),
        A.new_empty(0) if D is None else (dy * x).sum((0, 2)),
        A.new_empty(0) if delta_bias is None else ddelta.sum((0, 2)),
    )


def _steps(delta, delta_bias, delta_softplus):
    """Step sizes, and their derivative by ``delta``."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        return F.softplus(delta, threshold=EXACT), torch.sigmoid(delta)
    return delta, torch.ones_like(delta)


def _decay_and_drive(u, delta, A, B, delta_bias, delta_softplus, dtype):
    """exp(delta_t A) and delta_t B_t u_t, each (batch, dim, N, L), and u in the dtype of the state."""
    u = u.to(dtype)
    delta = delta.to(dtype).repeat_interleave(u.shape[1] // delta.shape[1], dim=1)
    delta, _ = _steps(delta, delta_bias, delta_softplus)
    decay = torch.exp(delta.unsqueeze(2) * A.unsqueeze(-1))
    return decay, (delta * u).unsqueeze(2) * _per_channel(B, u).to(dtype), u


def _per_channel(B, u):
    """B or C of every channel and step, (batch, dim, N, L)."""
    batch, dim, length = u.shape
    if B.dim() == 2:
        return B[None, :, :, None].expand(batch, -1, -1, length)
    if B.dim() == 3:
        B = B.unsqueeze(1)
    return B.repeat_interleave(dim // B.shape[1], dim=1)
