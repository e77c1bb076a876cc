"""The Mamba-2 scan in Triton.

Forward launches ``walk``, where there is more than one chunk or a state before the first, and ``outputs``.  Backward
launches ``walk`` for the states again, ``walk`` in reverse for their gradients, and ``gradients``.  The routes of a map
are added by ``add_routes``.  Every sum has a fixed order.
"""

import math
from contextlib import nullcontext
from typing import Optional

import torch
import triton
import triton.language as tl

from ..cross_scan.triton import _COLUMN, _REVERSE
from .triton_kernels import add_routes, gradients, outputs, walk

CHUNK = 32  # steps; longer ones have fewer states, and more pairs of steps
WHOLE = 64  # so many at most are one chunk, which needs no states, where they are small
# whether products round to the dtype of x what was computed from it, the states too, as Mamba-2's own kernels do;
# where not, they take it as float32, or of float16 as TF32, which has float16's digits and float32's range
NARROW = {torch.float32: False, torch.float16: True, torch.bfloat16: True}
# products of float32: three of TF32, good to 2e-7; 'ieee', without tensor cores, takes minutes to compile
EXACT = 'tf32x3'
PROGRAMS = 1024  # so many at least, if there are heads to share out
WALK_ROWS = 64  # of the state that a program of walk carries
ROUTES = 4
# Warps of a program, for heads whose state has at most SMALL_STATE elements of 16-bit x, and for larger ones.  No
# product has 64 rows and 4 warps: Triton 3.6 then takes Hopper's asynchronous ones, whose second operand its assembler
# (ptxas 12.8) reads from a register that nothing wrote, beyond shared memory.
WARPS = dict(walk=(1, 2), outputs=(1, 2), gradients=(2, 4))
SMALL_STATE = 1024


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _heads_dense(x: torch.Tensor) -> torch.Tensor:
    """(batch, L, H, P) with the channels of a step in one piece."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _last_dense(value: torch.Tensor) -> torch.Tensor:
    return value if value.stride(-1) == 1 else value.contiguous()


class _Problem:
    """What the two directions share: sizes, tensors as the kernels read them, and options of every kernel."""

    def __init__(self, x, dt, A, B, C, D, dt_bias, dt_softplus, height, width, scan_mode):
        self.x, self.dt, self.B, self.C = _heads_dense(x), _last_dense(dt), _last_dense(B), _last_dense(C)
        self.A, self.D, self.bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))
        self.batch, self.length, self.shared, self.channels = x.shape
        self.all_heads, self.groups, self.d_state = dt.shape[2], B.shape[2], B.shape[3]
        self.heads = self.all_heads // self.groups
        exact = x.dtype == torch.float32
        self.narrow = NARROW[x.dtype]
        P, N = _block(self.channels), _block(self.d_state)
        self.small = self.narrow and P * N <= SMALL_STATE
        chunk = min(WHOLE if self.small and self.length <= WHOLE else CHUNK, _block(self.length))
        self.chunks = triton.cdiv(self.length, chunk)
        self.routed = scan_mode >= 0
        self.place = (height, width, self.length, self.chunks)
        # rows of B and C begin at multiples of so many elements, which lets a thread load 16 bytes at once
        steps = (*self.B.stride()[:3], *self.C.stride()[:3])
        self.unit = math.gcd(16 // x.element_size(), *steps)
        image = self.length * max(
            self.x.stride(1), self.dt.stride(1), steps[1], steps[4], self.all_heads * self.channels
        )
        self.options = dict(
            SHARED=self.routed,
            COLUMN=_COLUMN[scan_mode] if self.routed else 0,
            REVERSE=_REVERSE[scan_mode] if self.routed else 0,
            SMALL=self.length <= 1 << 20 and image < 1 << 31,
            UNIT=self.unit,
            HAS_BIAS=dt_bias is not None,
            SOFTPLUS=dt_softplus,
            ACC=tl.float64 if exact else tl.float32,
            NARROW=self.narrow,
            PRECISION=EXACT if exact and torch.get_float32_matmul_precision() == 'highest' else 'tf32',
            Q=chunk,
            P=P,
            N=N,
        )

    def warps(self, kernel: str) -> int:
        return WARPS[kernel][0 if self.small else 1]

    @property
    def state_shape(self) -> tuple:
        return self.batch, self.all_heads, self.channels, self.d_state

    def in_units(self, matrix: torch.Tensor) -> tuple:
        """Strides of B or C, but for the last."""
        return tuple(stride // self.unit for stride in matrix.stride()[:3])

    def walk(self, value, matrix, first: Optional[torch.Tensor], last: Optional[torch.Tensor], backward: bool):
        """The states before each chunk, or their gradients after each; the one that remains is written to ``last``."""
        dtype = self.x.dtype if self.narrow else torch.float32
        batch, *shape = self.state_shape
        states = self.x.new_empty((batch, self.chunks, *shape), dtype=dtype)
        most = max(1, WALK_ROWS // self.options['P'])
        heads = next(n for n in (most, most // 2, most // 4, 1) if n and (self.heads % n == 0 or n == 1))
        walk[(self.batch * self.groups, triton.cdiv(self.heads, heads))](
            value, matrix, self.dt, self.A, self.bias, first, states, last,
            *value.stride()[:2], *self.in_units(matrix), *self.dt.stride()[:2],
            self.groups, self.heads, self.channels, self.d_state, *self.place,
            BACKWARD=backward, HAS_FIRST=first is not None, HAS_LAST=last is not None, HEADS=heads,
            num_warps=self.warps('walk'), **self.options,
        )  # fmt: skip
        return states

    def grid(self) -> tuple:
        """Programs of the chunks, and heads of each."""
        places = self.batch * self.groups * self.chunks
        turns = max(1, min(self.heads, self.heads * places // PROGRAMS))
        return (places, triton.cdiv(self.heads, turns)), turns

    def outputs(self, first: Optional[torch.Tensor], last: Optional[torch.Tensor], out: torch.Tensor) -> None:
        """The outputs, all chunks at once, from the states before them."""
        states = None
        has_state = self.chunks > 1 or first is not None
        if has_state or last is not None:
            states = self.walk(self.x, self.B, first, last, backward=False)
        grid, turns = self.grid()
        outputs[grid](
            self.x, self.dt, self.A, self.B, self.C, self.D, self.bias, states, out,
            *self.x.stride()[:2], *self.dt.stride()[:2], *self.in_units(self.B), *self.in_units(self.C),
            self.groups, self.heads, turns, self.channels, self.d_state, *self.place,
            HAS_STATE=has_state, HAS_D=self.D is not None, num_warps=self.warps('outputs'), **self.options,
        )  # fmt: skip

    def merge(self, parts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add the routes of (batch, L, all heads, P) to ``out``, (batch, L, heads, P)."""
        block = 1024
        add_routes[(triton.cdiv(out.numel(), block),)](
            parts, out, out.numel(), self.shared * self.channels, ROUTES=ROUTES, BLOCK=block
        )
        return out


def ssd_scan(
    x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, float_output, keep_state, height, width, scan_mode
):  # fmt: skip
    """Forward; arguments and results as in the schema of the op."""
    p = _Problem(x, dt, A, B, C, D, dt_bias, dt_softplus, height, width, scan_mode)
    first = None if initial_state is None else initial_state.contiguous()
    last = A.new_empty(p.state_shape if keep_state else (0,))
    out = torch.empty(x.shape, dtype=torch.float32 if float_output else x.dtype, device=x.device)
    parts = out.new_empty((*x.shape[:2], p.all_heads, x.shape[3])) if p.routed else out
    with _device_of(x):
        p.outputs(first, last if keep_state else None, parts)
        if p.routed:
            p.merge(parts, out)
    return out, last


def ssd_scan_backward(
    dout, dlast_state, x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, height, width, scan_mode
):  # fmt: skip
    """Gradients of :func:`ssd_scan` for its tensors, empty where they are absent."""
    p = _Problem(x, dt, A, B, C, D, dt_bias, dt_softplus, height, width, scan_mode)
    first, flow = (None if t is None else t.contiguous() for t in (initial_state, dlast_state))
    dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dout is None else _heads_dense(dout)
    grid, turns = p.grid()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = dx.new_empty((*x.shape[:2], p.all_heads, p.channels)) if p.routed else dx
    ddt = dx.new_empty(dt.shape)
    splits = grid[1]
    dB, dC = (torch.empty((splits, *B.shape), dtype=x.dtype if splits == 1 else A.dtype, device=x.device) for _ in 'BC')
    sums = A.new_empty((p.batch * p.chunks, p.all_heads, 2))
    none = A.new_empty(0)
    dD = none if D is None else A.new_empty((p.batch * p.chunks, p.all_heads, p.channels))
    dfirst = none if first is None else torch.empty_like(first)
    states = flows = None
    with _device_of(x):
        has_state, has_flow = p.chunks > 1 or first is not None, p.chunks > 1 or flow is not None
        if has_state:
            states = p.walk(p.x, p.B, first, None, backward=False)
        if has_flow or first is not None:
            flows = p.walk(dy, p.C, flow, None if first is None else dfirst, backward=True)
        gradients[grid](
            dy, p.x, p.dt, p.A, p.B, p.C, p.D, p.bias, states, flows, parts, ddt, dB, dC, sums, dD,
            *dy.stride()[:2], *p.x.stride()[:2], *p.dt.stride()[:2], *p.in_units(p.B), *p.in_units(p.C),
            p.batch * p.groups, p.groups, p.heads, turns, p.channels, p.d_state, *p.place,
            HAS_STATE=has_state, HAS_FLOW=has_flow, HAS_D=D is not None, num_warps=p.warps('gradients'), **p.options,
        )  # fmt: skip
        if p.routed:
            p.merge(parts, dx)
    dA, dbias = sums.sum(0).unbind(-1)
    dB, dC = (value[0] if splits == 1 else value.sum(0).to(x.dtype) for value in (dB, dC))
    return (
        dx, ddt, dA.contiguous(), dB, dC, none if D is None else dD.sum(0),
        none if dt_bias is None else dbias.contiguous(), dfirst,
    )  # fmt: skip


def _device_of(tensor: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
