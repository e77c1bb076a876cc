"""Forms of the arguments that no kernel takes, as the form that all of them take."""

from typing import Optional

import torch
import torch.nn.functional as F

from ..checks import state_dtype


def per_group(B: torch.Tensor, C: Optional[torch.Tensor], u: torch.Tensor) -> tuple:
    """B and C as (batch, K, N, L), from (batch, N, L) of one group, or (dim, N), which are constant over time."""
    B = _with_groups(B, u)
    if C is None:
        return B, None
    C = _with_groups(C, u)
    groups = max(B.shape[1], C.shape[1])  # a multiple of the other
    return _repeat(B, groups // B.shape[1]), _repeat(C, groups // C.shape[1])


def _with_groups(B, u):
    if B.dim() == 4:
        return B
    if B.dim() == 3:
        return B.unsqueeze(1)
    return B[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])


def _repeat(tensor, times):
    """Each entry of dimension 1 ``times`` times, one after the other."""
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=1)


def per_channel(delta: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Step sizes (batch, dim, L) from (batch, dim / r, L), of which r channels that follow each other share one."""
    return _repeat(delta, u.shape[1] // delta.shape[1])


def gate(y: torch.Tensor, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``y * silu(z)``, computed in the dtype of the state, in ``dtype``."""
    wide = state_dtype(y.dtype)
    return (y.to(wide) * F.silu(z.to(wide))).to(dtype)


def one_state_each(u, delta, A, B, delta_bias) -> tuple:
    """A scan whose output are the states of another: every state is a channel of its own, with N = 1 and C = 1.

    Channels come in the order (K, N, dim / K), so that those of a group still share B.

    Args:
        u (Tensor): (batch, dim, L).
        delta (Tensor): (batch, dim, L).
        A (Tensor): (dim, N).
        B (Tensor): (batch, K, N, L).
        delta_bias (Tensor, optional): (dim,).

    Returns:
        tuple: ``u``, ``delta``, ``A``, ``B``, ``C`` and ``delta_bias`` of dim * N channels in K * N groups.
    """
    groups, d_state = B.shape[1:3]

    def repeat(tensor):  # (batch, dim, L)
        tensor = tensor.unflatten(1, (groups, -1)).unsqueeze(2)
        return tensor.expand(-1, -1, d_state, -1, -1).flatten(1, 3)

    A = A.unflatten(0, (groups, -1)).transpose(1, 2).reshape(-1, 1)
    B = B.flatten(1, 2).unsqueeze(2)
    if delta_bias is not None:
        delta_bias = repeat(delta_bias[None, :, None]).flatten()
    return repeat(u), repeat(delta), A, B, torch.ones_like(B), delta_bias


def states_of(channels: torch.Tensor, groups: int, d_state: int) -> torch.Tensor:
    """States (batch, dim, N, ...) from the channels (batch, dim * N, ...) of :func:`one_state_each`."""
    return channels.unflatten(1, (groups, d_state, -1)).transpose(2, 3).flatten(1, 2)


def channels_of(states: torch.Tensor, groups: int) -> torch.Tensor:
    """The inverse of :func:`states_of`."""
    return states.unflatten(1, (groups, -1)).transpose(2, 3).flatten(1, 3)
