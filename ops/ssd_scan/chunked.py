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
    log_total: torch.Tensor  # b c g r 1 1, float64: over the whole chunk, its logarithm


def _cut(value: torch.Tensor, missing: int) -> torch.Tensor:
    """(b, L, ...) to (b, c, q, ...), padded with zeros."""
    value = F.pad(value, (*(0, 0) * (value.dim() - 2), 0, missing))
    return value.unflatten(1, (-1, CHUNK))


def _join(value: torch.Tensor, length: int) -> torch.Tensor:
    """(b, c, g, r, q, ...) to (b, L, g * r, ...)."""
    return value.movedim(4, 2).flatten(1, 2).flatten(2, 3)[:, :length]


def _prepare(length, x, dt, A, B, C, dt_bias, dt_softplus) -> _Chunks:
    dtype, groups, missing = state_dtype(x.dtype), B.shape[2], -length % CHUNK
    dt, slope = dt.to(dtype), None
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        slope = _by_head(_cut(dt.sigmoid(), missing), groups)
        dt = F.softplus(dt, threshold=EXACT)
    dt = _by_head(_cut(dt, missing), groups)  # b c g r q
    A = A.unflatten(0, (groups, -1))
    x = _by_head(_cut(x.to(dtype), missing), groups)
    B, C = (_cut(value.to(dtype), missing).transpose(2, 3).unsqueeze(3) for value in (B, C))
    cum = torch.cumsum(dt.double() * A.double().unsqueeze(-1), dim=-1)
    total = cum[..., -1:]
    decay, rest = (torch.exp(value.to(dtype)).unsqueeze(-1) for value in (cum, total - cum))
    return _Chunks(x, dt.unsqueeze(-1), slope, A, B, C, _decays(cum, dtype), decay, rest, total.unsqueeze(-1))


def _decays(cum: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """L of sums (..., q): exp(cum_t - cum_s) for t >= s, else 0."""
    step = torch.arange(cum.shape[-1], device=cum.device)
    later = step > step.unsqueeze(1)
    return torch.exp((cum.unsqueeze(-1) - cum.unsqueeze(-2)).to(dtype).masked_fill(later, float('-inf')))


def _by_head(value: torch.Tensor, groups: int) -> torch.Tensor:
    """(b, c, q, H, ...) to (b, c, g, r, q, ...)."""
    return value.unflatten(3, (groups, -1)).movedim(2, 4)


def carry(states: torch.Tensor, log_total: torch.Tensor, first: Optional[torch.Tensor]) -> tuple:
    """Carry a state through the chunks.

    Args:
        states (Tensor): (b, c, g, r, p, n), what each chunk adds.
        log_total (Tensor): (b, c, g, r, 1, 1), of what each chunk leaves of the state before it.
        first (Tensor, optional): (b, g, r, p, n), the state before the first; None for zeros.

    Returns:
        tuple[Tensor, Tensor]: The states before each chunk, and the one after the last.
    """
    first, before = torch.zeros_like(states[:, 0]) if first is None else first, []
    for state, decay in zip(states.unbind(1), log_total.to(states.dtype).exp().unbind(1)):
        before.append(first)
        first = decay * first + state
    return torch.stack(before, dim=1), first


def carry_at_once(states: torch.Tensor, log_total: torch.Tensor, first: Optional[torch.Tensor]) -> tuple:
    """:func:`carry` as one matrix product over the chunks, for exporters that can't loop; quadratic in their number."""
    cum = torch.cumsum(log_total.flatten(2), dim=1).transpose(1, 2)  # b gr c
    weights = _decays(F.pad(cum, (1, 0)), states.dtype)
    # an exporter would take the batch of zeros for a constant, so they are padding
    items = F.pad(states, (*(0, 0) * 4, 1, 0)) if first is None else torch.cat([first.unsqueeze(1), states], dim=1)
    items = items.flatten(2, 3).flatten(3).transpose(1, 2)  # b gr c+1 pn
    after = (weights @ items).transpose(1, 2).unflatten(2, states.shape[2:4]).unflatten(4, states.shape[4:])
    return after[:, :-1], after[:, -1]


def _first(state: Optional[torch.Tensor], states: torch.Tensor) -> Optional[torch.Tensor]:
    """A state (b, H, p, n) in the form of one of ``states``."""
    return None if state is None else state.unflatten(1, states.shape[2:4])


def ssd_scan(
    x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, dt_softplus=False, carry: Any = carry, length: Any = None
) -> tuple:
    """The scan of plain sequences; arguments as in :func:`mmvmamba.ops.ssd_scan`.

    Args:
        carry (Callable): Carries the state through the chunks, as :func:`carry` does, which loops.
        length (int, optional): L, for an exporter that would take the one of ``x`` for a constant.

    Returns:
        tuple[Tensor, Tensor]: ``out`` (batch, L, H, P) and the last state (batch, H, P, N), in the dtype of the state.
    """
    length = x.shape[1] if length is None else length
    chunks = _prepare(length, x, dt, A, B, C, dt_bias, dt_softplus)
    x, B, C = chunks.dt * chunks.x, chunks.B, chunks.C
    states = (chunks.rest * x).transpose(-1, -2) @ B
    states, last = carry(states, chunks.log_total, _first(initial_state, states))
    y = (chunks.L * (C @ B.transpose(-1, -2))) @ x + chunks.decay * (C @ states.transpose(-1, -2))
    if D is not None:
        y = y + D.unflatten(0, (B.shape[2], -1)).unsqueeze(-2) * chunks.x
    return _join(y, length), last.flatten(1, 2)


def ssd_scan_backward(dout, dlast, x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus) -> tuple:
    """Gradients of :func:`ssd_scan` for its tensors, in the dtype of the state; None for those that are absent."""
    length, groups = x.shape[1], B.shape[2]
    chunks = _prepare(length, x, dt, A, B, C, dt_bias, dt_softplus)
    _, dt, _, A, B, C, L, decay, rest, log_total = chunks
    x, total = chunks.x, log_total.to(chunks.x.dtype).exp()
    dy = torch.zeros_like(x) if dout is None else _by_head(_cut(dout.to(x.dtype), -length % CHUNK), groups)
    states = (rest * dt * x).transpose(-1, -2) @ B
    states, _ = carry(states, log_total, _first(initial_state, states))  # before each chunk
    flows = ((decay * dy).transpose(-1, -2) @ C).flip(1)
    flows, dinitial = carry(flows, log_total.flip(1), _first(dlast, flows))
    flows = flows.flip(1)  # the gradient of the state after each chunk

    pairs = C @ B.transpose(-1, -2)  # C_t . B_s
    inside = L * (dy @ x.transpose(-1, -2)) * dt.transpose(-1, -2)
    dpairs = inside.sum(3, keepdim=True)
    dC_state = decay * (dy @ states)
    dB_state = rest * dt * (x @ flows)
    dC = dpairs @ B + dC_state.sum(3, keepdim=True)
    dB = dpairs.transpose(-1, -2) @ C + dB_state.sum(3, keepdim=True)
    ddrive = (L * pairs).transpose(-1, -2) @ dy + rest * (B @ flows.transpose(-1, -2))  # of dt x
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
