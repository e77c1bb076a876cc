"""The scan of Mamba-2 as matrix products, section 6 of `Mamba-2 <https://arxiv.org/abs/2405.21060>`_.

The decay is one number a head and step.  So inside a chunk of steps the output is a product with a masked matrix,
y = (L o C B^T) (dt x) with L_ts = exp(cum_t - cum_s) for t >= s, where cum adds up dt A; between chunks a state is
carried, decayed by a chunk's whole cum.  cum is kept in float64: its differences lose digits that L needs.

Letters of shapes: b batch, c chunks, q steps of a chunk, g groups, r heads of a group, p channels of a head, n states.
"""

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F

from ..checks import state_dtype
from ..selective_scan.naive import EXACT

CHUNK = 64


class _Chunks(NamedTuple):
    """The arguments by chunks, and what both directions compute of them."""

    x: torch.Tensor  # b c g r q p
    dt: torch.Tensor  # b c g r q 1, after softplus; 0 beyond the last step, which then changes nothing
    slope: Optional[torch.Tensor]  # b c g r q: that of softplus
    A: torch.Tensor  # g r
    B: torch.Tensor  # b c g 1 q n
    C: torch.Tensor  # b c g 1 q n
    L: torch.Tensor  # b c g r q q
    decay: torch.Tensor  # b c g r q 1: from the state before the chunk to a step
    rest: torch.Tensor  # b c g r q 1: from a step to the end of the chunk
    total: torch.Tensor  # b c g r 1 1: over the whole chunk


def _cut(value: torch.Tensor) -> torch.Tensor:
    """(b, L, ...) to (b, c, q, ...), padded with zeros."""
    missing = -value.shape[1] % CHUNK
    value = F.pad(value, (*(0, 0) * (value.dim() - 2), 0, missing))
    return value.unflatten(1, (-1, CHUNK))


def _join(value: torch.Tensor, length: int) -> torch.Tensor:
    """(b, c, g, r, q, ...) to (b, L, g * r, ...)."""
    return value.movedim(4, 2).flatten(1, 2).flatten(2, 3)[:, :length]


def _prepare(x, dt, A, B, C, dt_bias, dt_softplus) -> _Chunks:
    dtype, groups = state_dtype(x.dtype), B.shape[2]
    dt, slope = dt.to(dtype), None
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        slope = _by_head(_cut(dt.sigmoid()), groups)
        dt = F.softplus(dt, threshold=EXACT)
    dt = _by_head(_cut(dt), groups)  # b c g r q
    A = A.unflatten(0, (groups, -1))
    x = _by_head(_cut(x.to(dtype)), groups)
    B, C = (_cut(value.to(dtype)).transpose(2, 3).unsqueeze(3) for value in (B, C))
    cum = torch.cumsum(dt.double() * A.double().unsqueeze(-1), dim=-1)
    total = cum[..., -1:]
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).triu(1)
    L = torch.exp((cum.unsqueeze(-1) - cum.unsqueeze(-2)).to(dtype).masked_fill(later, float('-inf')))
    decay, rest, total = (torch.exp(value.to(dtype)).unsqueeze(-1) for value in (cum, total - cum, total))
    return _Chunks(x, dt.unsqueeze(-1), slope, A, B, C, L, decay, rest, total)


def _by_head(value: torch.Tensor, groups: int) -> torch.Tensor:
    """(b, c, q, H, ...) to (b, c, g, r, q, ...)."""
    return value.unflatten(3, (groups, -1)).movedim(2, 4)


def carry(states: torch.Tensor, total: torch.Tensor, first: torch.Tensor) -> tuple:
    """Carry a state through the chunks.

    Args:
        states (Tensor): (b, c, g, r, p, n), what each chunk adds.
        total (Tensor): (b, c, g, r, 1, 1), what each chunk leaves of the state before it.
        first (Tensor): (b, g, r, p, n), the state before the first.

    Returns:
        tuple[Tensor, Tensor]: The states before each chunk, and the one after the last.
    """
    before = []
    for state, decay in zip(states.unbind(1), total.unbind(1)):
        before.append(first)
        first = decay * first + state
    return torch.stack(before, dim=1), first


def _first_state(state: Optional[torch.Tensor], chunks: _Chunks) -> torch.Tensor:
    batch, _, groups, heads, _, channels = chunks.x.shape
    if state is None:
        return chunks.x.new_zeros(batch, groups, heads, channels, chunks.B.shape[-1])
    return state.unflatten(1, (groups, heads))


def ssd_scan(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, dt_softplus=False, carry: Any = carry) -> tuple:
    """The scan of plain sequences; arguments as in :func:`mmvmamba.ops.ssd_scan`.

    Args:
        carry (Callable): Carries the state through the chunks, as :func:`carry` does, which loops.

    Returns:
        tuple[Tensor, Tensor]: ``out`` (batch, L, H, P) and the last state (batch, H, P, N), in the dtype of the state.
    """
    chunks = _prepare(x, dt, A, B, C, dt_bias, dt_softplus)
    x, B, C = chunks.dt * chunks.x, chunks.B, chunks.C
    states, last = carry((chunks.rest * x).mT @ B, chunks.total, _first_state(initial_state, chunks))
    y = (chunks.L * (C @ B.mT)) @ x + chunks.decay * (C @ states.mT)
    if D is not None:
        y = y + D.unflatten(0, (B.shape[2], -1)).unsqueeze(-2) * chunks.x
    return _join(y, dt.shape[1]), last.flatten(1, 2)


def ssd_scan_backward(dout, dlast, x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus) -> tuple:
    """Gradients of :func:`ssd_scan` for its tensors, in the dtype of the state; None for those that are absent."""
    length, groups = x.shape[1], B.shape[2]
    chunks = _prepare(x, dt, A, B, C, dt_bias, dt_softplus)
    _, dt, _, A, B, C, L, decay, rest, total = chunks
    x = chunks.x
    dy = torch.zeros_like(x) if dout is None else _by_head(_cut(dout.to(x.dtype)), groups)
    first = _first_state(initial_state, chunks)
    states, _ = carry((rest * dt * x).mT @ B, total, first)  # before each chunk
    flows, dinitial = carry(((decay * dy).mT @ C).flip(1), total.flip(1), _first_state(dlast, chunks))
    flows = flows.flip(1)  # the gradient of the state after each chunk

    pairs = C @ B.mT  # C_t . B_s
    inside = L * (dy @ x.mT) * dt.mT
    dpairs = inside.sum(3, keepdim=True)
    dC_state = decay * (dy @ states)
    dB_state = rest * dt * (x @ flows)
    dC = dpairs @ B + dC_state.sum(3, keepdim=True)
    dB = dpairs.mT @ C + dB_state.sum(3, keepdim=True)
    ddrive = (L * pairs).mT @ dy + rest * (B @ flows.mT)  # of dt x
    # of the decays: step u takes part in every pair t >= u > s, in what the state before gave to t >= u, in what
    # s < u gave to the state after, and in what is left of the one in the other
    inside = (inside * pairs).tril(-1)
    to_later = (dB_state * B).sum(-1)
    along = inside.sum(-1) - inside.sum(-2) + (dC_state * C).sum(-1)
    through = total.squeeze(-1) * (flows * states).sum((-1, -2)).unsqueeze(-1)
    dlog = along.flip(-1).cumsum(-1).flip(-1) + to_later.cumsum(-1) - to_later + through  # of log decay
    ddt = (x * ddrive).sum(-1) + A.unsqueeze(-1) * dlog
    if chunks.slope is not None:
        ddt = ddt * chunks.slope
    dx = dt * ddrive
    if D is not None:
        dx = dx + D.unflatten(0, (groups, -1)).unsqueeze(-2) * dy
    ddt = _join(ddt, length)
    return (
        _join(dx, length),
        ddt,
        (dlog * dt.squeeze(-1)).sum((0, 1, 4)).flatten(),
        _join(dB, length),
        _join(dC, length),
        None if D is None else (dy * x).sum((0, 1, 4)).flatten(0, 1),
        None if dt_bias is None else ddt.sum((0, 1)),
        None if initial_state is None else dinitial.flatten(1, 2),
    )
