"""The scan of Mamba-2 as written in its paper, one step after the other: the truth the other backends are held to."""

import torch
import torch.nn.functional as F

from ..checks import state_dtype
from ..selective_scan.naive import EXACT


def ssd_scan(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, dt_softplus=False):
    """State-space scan by a Python loop over time; differentiable by autograd, also in float64.

    Arguments as in :func:`mmvmamba.ops.ssd_scan`, for plain sequences.

    Returns:
        tuple[Tensor, Tensor]: ``out`` (batch, L, H, P) and the last state (batch, H, P, N), in the dtype of the state.
    """
    dtype = state_dtype(x.dtype)
    heads_per_group = x.shape[2] // B.shape[2]
    x, dt = x.to(dtype), dt.to(dtype)
    B = B.to(dtype).repeat_interleave(heads_per_group, dim=2)  # (batch, L, H, N)
    C = C.to(dtype).repeat_interleave(heads_per_group, dim=2)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt, threshold=EXACT)

    decay = torch.exp(dt * A)  # (batch, L, H)
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        drive = (dt[:, t, :, None] * x[:, t]).unsqueeze(3) * B[:, t].unsqueeze(2)  # dt_t x_t B_t^T: (batch, H, P, N)
        h = decay[:, t, :, None, None] * h + drive
        outputs.append((h * C[:, t].unsqueeze(2)).sum(3))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D * x
    return y, h
