"""The selective scan as written in the paper, one step after the other: the truth the other backends are held to."""

import torch
import torch.nn.functional as F

from ..checks import state_dtype

EXACT = 40.0  # from here on softplus is its argument to float64's last bit; PyTorch's own 20 is off by 2e-9


def selective_scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, out_dtype=None):
    """Selective scan by a Python loop over time; differentiable by autograd, also in float64.

    Arguments as in :func:`mmvmamba.ops.selective_scan`.

    Returns:
        tuple[Tensor, Tensor]: ``out`` (batch, dim, L) and the last state (batch, dim, N).
    """
    dtype = state_dtype(u.dtype)
    out_dtype = out_dtype or u.dtype
    channels_per_group = u.shape[1] // B.shape[1]
    u, delta = u.to(dtype), delta.to(dtype)
    B = B.to(dtype).repeat_interleave(channels_per_group, dim=1)  # (batch, dim, N, L)
    C = C.to(dtype).repeat_interleave(channels_per_group, dim=1)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta, threshold=EXACT)

    decay = torch.exp(delta.unsqueeze(2) * A.unsqueeze(-1))  # exp(delta_t A): (batch, dim, N, L)
    drive = (delta * u).unsqueeze(2) * B  # delta_t B_t u_t
    h = torch.zeros_like(drive[..., 0])
    states = []
    for decay_t, drive_t in zip(decay.unbind(-1), drive.unbind(-1)):
        h = decay_t * h + drive_t
        states.append(h)
    y = (torch.stack(states, dim=-1) * C).sum(dim=2)
    if D is not None:
        y = y + D[:, None] * u
    return y.to(out_dtype), h
