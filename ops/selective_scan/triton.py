"""The selective scan in Triton, for GPUs where the C++ kernels are not built.

A program owns a few channels of one group and walks along time, 256 steps a tile: an associative scan inside the tile,
the state from tile to tile in registers.  Forward moves u and delta in and out once; backward dout, u and delta in, du
and ddelta out, and 8 bytes a step, state and program of partial sums of dB and dC, then added in a fixed order.
States are taken one after the other: for N > 1 the tiles are read N times and sums over N kept in float32.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from ..triton_softplus import log1p_ratio

CHUNK = 256  # steps between two saved states; TRITON_CHUNK of registration.py
FORWARD_WARPS, BACKWARD_WARPS = 1, 1  # measured on an H200: scans across warps go through shared memory
TURNS = 4  # sets of channels that a program of backward takes one after the other
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _combine(decay1, drive1, decay2, drive2):
    """h -> decay h + drive, first 1, then 2."""
    return decay1 * decay2, decay2 * drive1 + drive2


@triton.jit
def _combine_adjoint(a2, decay2, drive2, a1, decay1, drive1):
    """s_t = C_t dy_t + a_{t+1} s_{t+1} for a stretch of steps before another one; a is that of its first step."""
    return a1, decay1 * a2 * decay2, decay1 * a2 * drive2 + drive1


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(z) with z = exp(-|x|), and z."""
    z = tl.exp2(tl.abs(x) * -1.4426950408889634)
    return tl.maximum(x, 0.0) + z * log1p_ratio(z), z


@triton.jit
def _base_two(A):
    """A for powers of two; beyond float32 it stays finite, so that a step of 0 keeps the state.  NaN stays NaN."""
    A = A * 1.4426950408889634
    A = tl.where(A > 3.4028234663852886e38, 3.4028234663852886e38, A)
    return tl.where(A < -3.4028234663852886e38, -3.4028234663852886e38, A)


@triton.jit
def _load_steps(delta, bias, at, channel, mask, HAS_BIAS: tl.constexpr):
    """delta + bias of a tile, in float32."""
    x = tl.load(delta + at, mask, 0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + channel)[:, None]
    return x


@triton.jit
def _forward(
    u, delta, A, B, C, D, bias, out, states, groups, channels, d_state, length, chunks,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_D channels of a group, all of time. ``out`` is float32 unless SINGLE."""
    pair = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = own < channels
    own = tl.minimum(own, channels - 1)
    channel = (pair % groups).to(tl.int32) * channels + own
    row = pair * channels + own
    lane = tl.arange(0, BLOCK_L)
    for n in range(0, 1 if SINGLE else d_state):
        A_n = _base_two(tl.load(A + channel * d_state + n))
        state = tl.zeros([BLOCK_D], tl.float32)
        saved = states + row * (chunks + 1) * d_state + n
        tl.store(saved, state, valid)
        shared = (pair * d_state + n) * length
        for chunk in range(0, chunks):
            t = chunk * BLOCK_L + lane
            inside = t < length
            mask = valid[:, None] & inside[None, :]
            at = row[:, None] * length + t[None, :]
            x = _load_steps(delta, bias, at, channel, mask, HAS_BIAS)
            if SOFTPLUS:
                x, _ = _softplus(x)
            dt = tl.where(inside[None, :], x, 0.0)
            u_t = tl.load(u + at, mask, 0.0).to(tl.float32)
            B_t = tl.load(B + shared + t, inside, 0.0).to(tl.float32)
            C_t = tl.load(C + shared + t, inside, 0.0).to(tl.float32)
            decay, drive = tl.associative_scan(
                (tl.exp2(dt * A_n[:, None]), dt * u_t * B_t[None, :]), axis=1, combine_fn=_combine
            )
            h = decay * state[:, None] + drive
            state = tl.sum(tl.where((lane == BLOCK_L - 1)[None, :], h, 0.0), axis=1)
            tl.store(saved + (chunk + 1) * d_state, state, valid)
            y = h * C_t[None, :]
            if HAS_D:
                y += (tl.load(D + channel)[:, None] * u_t) * (1.0 if SINGLE else tl.where(n == 0, 1.0, 0.0))
            if not SINGLE:
                y += tl.load(out + at, mask & (n > 0), 0.0)
            tl.store(out + at, y.to(out.dtype.element_ty), mask)


@triton.jit
def _backward(
    dout, u, delta, A, B, C, D, bias, states, flows, du, ddelta, dA, dD, dbias, partial,
    pairs, groups, channels, d_state, length, chunks,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SINGLE: tl.constexpr,
    TURNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program: TURNS times BLOCK_D channels of a group, from the last tile to the first.

    ``flows``, dA, dD and dbias start at zero; du and ddelta are float32 unless SINGLE.
    """
    pair = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_L)
    for n in range(0, 1 if SINGLE else d_state):
        shared = (pair * d_state + n) * length
        split = tl.program_id(1).to(tl.int64)
        sums_B = partial + ((split * 2 * pairs + pair) * d_state + n) * length
        sums_C = partial + ((split * 2 * pairs + pairs + pair) * d_state + n) * length
        for step in range(0, chunks):
            chunk = chunks - 1 - step
            t = chunk * BLOCK_L + lane
            inside = t < length
            B_t = tl.load(B + shared + t, inside, 0.0).to(tl.float32)[None, :]
            C_t = tl.load(C + shared + t, inside, 0.0).to(tl.float32)[None, :]
            sum_B = tl.zeros([BLOCK_L], tl.float32)
            sum_C = tl.zeros([BLOCK_L], tl.float32)
            for turn in range(0, TURNS):
                own = (tl.program_id(1) * TURNS + turn) * BLOCK_D + tl.arange(0, BLOCK_D)
                valid = own < channels
                own = tl.minimum(own, channels - 1)
                channel = (pair % groups).to(tl.int32) * channels + own
                row = pair * channels + own
                mask = valid[:, None] & inside[None, :]
                at = row[:, None] * length + t[None, :]
                x = _load_steps(delta, bias, at, channel, mask, HAS_BIAS)
                u_t = tl.load(u + at, mask, 0.0).to(tl.float32)
                dy = tl.load(dout + at, mask, 0.0).to(tl.float32)
                if SOFTPLUS:
                    dt, z = _softplus(x)
                    slope = tl.where(x >= 0, 1.0, z) / (1.0 + z)
                else:
                    dt = x
                dt = tl.where(inside[None, :], dt, 0.0)
                A_n = tl.load(A + channel * d_state + n)[:, None]
                a = tl.exp2(dt * _base_two(A_n))
                b = dt * u_t * B_t
                carry = tl.load(states + (row * (chunks + 1) + chunk) * d_state + n)
                decay, drive = tl.associative_scan((a, b), axis=1, combine_fn=_combine)
                h = decay * carry[:, None] + drive
                sum_C += tl.sum(dy * h, axis=0)
                # h - b is the decayed state of the step before; none precedes the first, and where nothing is left the
                # difference of equals need not round to 0, while A may be huge
                before = tl.where((t == 0)[None, :] | (a == 0), 0.0, h - b)
                ones = tl.full([BLOCK_D, BLOCK_L], 1.0, tl.float32)
                _, decay, drive = tl.associative_scan(
                    (a, ones, C_t * dy), axis=1, combine_fn=_combine_adjoint, reverse=True
                )
                flow = flows + row * d_state + n
                s = decay * tl.load(flow)[:, None] + drive
                s = tl.where(valid[:, None], s, 0.0)  # a channel beyond the last adds nothing
                tl.debug_barrier()
                tl.store(flow, tl.sum(tl.where((lane == 0)[None, :], a * s, 0.0), axis=1), valid)
                sum_B += tl.sum(s * dt * u_t, axis=0)
                ddecay = s * before
                du_t = s * B_t * dt
                ddt = s * B_t * u_t + A_n * ddecay
                if SOFTPLUS:
                    ddt *= slope
                _add(dA + row * d_state + n, tl.sum(ddecay * dt, axis=1), valid)
                _add(dbias + row, tl.sum(tl.where(mask, ddt, 0.0), axis=1), valid)
                if SINGLE or n == 0:
                    _add(dD + row, tl.sum(dy * u_t, axis=1), valid)
                    if HAS_D:
                        du_t += tl.load(D + channel)[:, None] * dy
                if not SINGLE:
                    du_t += tl.load(du + at, mask & (n > 0), 0.0)
                    ddt += tl.load(ddelta + at, mask & (n > 0), 0.0)
                tl.store(du + at, du_t.to(du.dtype.element_ty), mask)
                tl.store(ddelta + at, ddt.to(ddelta.dtype.element_ty), mask)
                tl.debug_barrier()  # the next turn or tile reads what others of the program wrote
            tl.store(sums_B + t, sum_B, inside)
            tl.store(sums_C + t, sum_C, inside)


@triton.jit
def _add(at, value, mask):
    """Add to a sum that belongs to this program alone."""
    tl.store(at, tl.load(at, mask, 0.0) + value, mask)


def _blocks(channels: int, length: int, warps: int) -> tuple:
    block_l = min(CHUNK, max(16, triton.next_power_of_2(length)))
    block_d = warps * CHUNK // block_l
    return min(block_d, triton.next_power_of_2(channels)), block_l


def _check_dtype(u: torch.Tensor) -> None:
    if u.dtype not in DTYPES:
        raise TypeError(f'selective_scan: the triton kernels take float32, float16 and bfloat16, got {u.dtype}')


def _dense(*tensors) -> tuple:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def selective_scan_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype):
    """Forward; arguments as in :func:`mmvmamba.ops.selective_scan`.

    Returns:
        tuple[Tensor, Tensor]: ``out`` (batch, dim, L) and the states (batch, dim, chunks + 1, N) before each chunk of
        256 steps, and after the last.
    """
    _check_dtype(u)
    u, delta, A, B, C, D, delta_bias = _dense(u, delta, A, B, C, D, delta_bias)
    batch, dim, length = u.shape
    groups, d_state = B.shape[1:3]
    channels, chunks = dim // groups, triton.cdiv(length, CHUNK)
    single = d_state == 1
    out = torch.empty_like(u, dtype=out_dtype if single else torch.float32)
    states = A.new_empty((batch, dim, chunks + 1, d_state))
    block_d, block_l = _blocks(channels, length, FORWARD_WARPS)
    with _device_of(u):
        _forward[(batch * groups, triton.cdiv(channels, block_d))](
            u, delta, A, B, C, D, delta_bias, out, states, groups, channels, d_state, length, chunks,
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, SINGLE=single,
            BLOCK_D=block_d, BLOCK_L=block_l, num_warps=FORWARD_WARPS,
        )  # fmt: skip
    return out.to(out_dtype), states


def selective_scan_bwd(dout, u, delta, A, B, C, D, delta_bias, states, delta_softplus):
    """Gradients of :func:`selective_scan_fwd` for u, delta, A, B, C, D and delta_bias (empty where absent)."""
    _check_dtype(u)
    dout, u, delta, A, B, C, D, delta_bias, states = _dense(dout, u, delta, A, B, C, D, delta_bias, states)
    batch, dim, length = u.shape
    groups, d_state = B.shape[1:3]
    channels, chunks = dim // groups, triton.cdiv(length, CHUNK)
    single = d_state == 1
    du, ddelta = (torch.empty_like(u, dtype=u.dtype if single else torch.float32) for _ in range(2))
    block_d, block_l = _blocks(channels, length, BACKWARD_WARPS)
    turns = max(1, min(TURNS, triton.cdiv(channels, block_d), batch * dim // (block_d * 8192)))
    splits = triton.cdiv(channels, block_d * turns)
    flows, dA = A.new_zeros((2, batch, dim, d_state))
    dD, dbias = A.new_zeros((2, batch, dim))
    partial = A.new_empty((splits, 2, *B.shape))
    with _device_of(u):
        _backward[(batch * groups, splits)](
            dout, u, delta, A, B, C, D, delta_bias, states, flows, du, ddelta, dA, dD, dbias, partial,
            batch * groups, groups, channels, d_state, length, chunks,
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, SINGLE=single,
            TURNS=turns, BLOCK_D=block_d, BLOCK_L=block_l, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    dB, dC = partial.sum(0).to(u.dtype)
    none = A.new_empty(0)
    return (
        du.to(u.dtype), ddelta.to(u.dtype), dA.sum(0), dB.clone(), dC.clone(),
        none if D is None else dD.sum(0), none if delta_bias is None else dbias.sum(0),
    )  # fmt: skip


def _device_of(tensor: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
