"""Triton kernels of the fused SS2D core for several states a channel, backward; vocabulary in ``triton_kernels.py``.

With g_t = dL/dh_t: g_t = C_t dy_t + s_{t+1}, s_t = decay_t g_t; s runs against the scan.  A state is scanned again from
what entered its block, then s; both leave a sum over states a step, with B and with A, of which du2 and dx are made.
"""

import triton
import triton.language as tl

from .triton_kernels import (
    LN2,
    SIZES,
    as_float,
    entering_state,
    load_segment,
    locate,
    ordered,
    scan_carries,
    softplus2_slope,
    store_segment,
    unpack,
)
from .triton_states_forward import load_state, load_step_sizes, store_carry, total, without_B


@triton.jit
def _decays(d2s, A, T: tl.constexpr):
    """Decays of a segment's steps."""
    decays = ()
    for i in tl.static_range(T):
        decays = decays + (tl.exp2(A * d2s[i]),)
    return decays


@triton.jit
def _end_of_s(decays, dys, words, dtype: tl.constexpr, T: tl.constexpr):
    """s before a segment if none comes from behind it."""
    end = tl.zeros(decays[0].shape, tl.float32)
    for i in tl.static_range(T):
        _, C = unpack(words[T - 1 - i], dtype)
        end = decays[T - 1 - i] * (C * dys[T - 1 - i].to(tl.float32) + end)
    return end


@triton.jit
def _leave_carries(
    dys, inputs, carries, row, where, d_state, q, r, REVERSED: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr
):
    dys = ordered(dys, REVERSED, T)
    d2s = load_step_sizes(inputs, where, q, REVERSED, HALF, T)
    d2 = total(d2s, T)
    for n in range(d_state):
        words, A = load_state(inputs, where, q, n, d_state, REVERSED, T)
        end = _end_of_s(_decays(d2s, A, T), dys, words, inputs[1].dtype.element_ty, T)
        store_carry(carries, (row * 2 + r) * d_state + n, where, d2, A, end)


@triton.jit(do_not_specialize=[*SIZES, 'd_state'])
def leave_carries_back(
    dy, u, projections, floats, products, ends,
    groups, chain, segments, length, height, width, channels, columns, d_state,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the carries of s of a block, a lone segment, both routes of a pair.

    Moves dy and u in, 2 N values a channel and route out.
    """
    row, _, _, where = locate(groups, chain, length, height, width, channels, columns, COLUMN, T, S, C)
    inputs, carries = (u, projections, floats), (products, ends)
    dys = load_segment(dy, where, T)
    _leave_carries(dys, inputs, carries, row, where, d_state, 2 * PAIR, 0, False, HALF, T)
    _leave_carries(dys, inputs, carries, row, where, d_state, 2 * PAIR + 1, 1, SECOND_REVERSED, HALF, T)


@triton.jit
def _enter(decays, product, drives, words, entering, slot, where, dtype: tl.constexpr,
           REVERSED: tl.constexpr, CHAINED: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The state that enters each segment of a block."""
    end = tl.zeros(product.shape, tl.float32)
    for i in tl.static_range(T):
        B, _ = unpack(words[i], dtype)
        end = decays[i] * end + drives[i] * B
    _, _, before, state = scan_carries(product, end, REVERSED)
    if CHAINED:
        state += before * entering_state(entering, slot, where)
    return state


@triton.jit
def _enter_back(decays, product, dys, words, flows, slot, where, dtype: tl.constexpr,
                REVERSED: tl.constexpr, CHAINED: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The s that comes to each segment of a block from behind it."""
    end = _end_of_s(decays, dys, words, dtype, T)
    _, _, before, s = scan_carries(product, end, not REVERSED)
    if CHAINED:
        s += before * entering_state(flows, slot, where)
    return s


@triton.jit
def _states(decays, drives, words, h, dtype: tl.constexpr, T: tl.constexpr):
    """The T + 1 states before, between and after the steps, from ``h`` on."""
    hs = (h,)
    for i in tl.static_range(T):
        B, _ = unpack(words[i], dtype)
        hs = hs + (decays[i] * hs[i] + drives[i] * B,)
    return hs


@triton.jit
def _walk_back(with_B, with_A, steps, hs, words, A, s, part_at, places, dtype: tl.constexpr, T: tl.constexpr):
    """One state from the last step to the first: adds to the sums over states, stores dB and dC.

    Returns:
        tuple: ``with_B`` and ``with_A`` with this state's, and dA summed over the steps.
    """
    d2s, drives, dys, decays = steps
    offsets, exist, second = places
    dA = tl.zeros(s.shape, tl.float32)
    sums_B, sums_A = (), ()
    for i in tl.static_range(T):
        B, C = unpack(words[T - 1 - i], dtype)
        dy = dys[T - 1 - i].to(tl.float32)
        g = C * dy + s
        s = decays[T - 1 - i] * g
        through = s * hs[T - 1 - i]
        sums_B = (with_B[T - 1 - i] + g * B,) + sums_B
        sums_A = (with_A[T - 1 - i] + A * through,) + sums_A
        dA += d2s[T - 1 - i] * through
        dB = tl.sum(g * drives[T - 1 - i], axis=1, keep_dims=True)
        dC = tl.sum(hs[T - i] * dy, axis=1, keep_dims=True)
        tl.store(part_at + offsets[T - 1 - i], tl.where(second, dC, dB), exist[T - 1 - i])
    return sums_B, sums_A, dA


@triton.jit
def _finish(dxs, xs, d2s, with_B, with_A, HALF: tl.constexpr, T: tl.constexpr):
    """dx with this route's, du2 of the steps, and their sum."""
    dbias = tl.zeros(d2s[0].shape, tl.float32)
    sums, dus = (), ()
    for i in tl.static_range(T):
        du = (xs[i].to(tl.float32) * with_B[i] + with_A[i] * LN2) * softplus2_slope(d2s[i], HALF)
        sums = sums + (dxs[i] + d2s[i] * with_B[i],)
        dus = dus + (du,)
        dbias += du
    return sums, dus, dbias


@triton.jit
def _places(where, r, d_state, REVERSED: tl.constexpr, T: tl.constexpr):
    """Where in ``parts`` the steps of a route go, in its order, which exist, and whether a lane has dC.

    The first two lanes of channels store dB and dC, so that a sum stays in the layout of its tile.
    """
    _, pixels, exist, channel, _, _, _ = where
    lane = tl.arange(0, channel.shape[1])[None, :]
    offsets, masks = (), ()
    for t in tl.static_range(T):
        offsets = offsets + (pixels[t] * (4 * d_state) + r * 2 * d_state + lane,)
        masks = masks + (exist[t] & (lane < 2),)
    return ordered(offsets, REVERSED, T), ordered(masks, REVERSED, T), lane == 1


@triton.jit
def _add_route(
    dxs, xs, dys, inputs, entering, flows, row, part_at, sums_at, padded, where, d_state, q, r,
    REVERSED: tl.constexpr, CHAINED: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of one route: adds to ``dxs``, stores all others.

    ``entering`` and ``flows`` are h and s from the blocks around; ``part_at`` is where dB and dC of the image's first
    pixel go, ``sums_at`` where the sums over steps, in rows of ``padded``.
    """
    dtype: tl.constexpr = inputs[1].dtype.element_ty
    xs, dys, dxs = ordered(xs, REVERSED, T), ordered(dys, REVERSED, T), ordered(dxs, REVERSED, T)
    places = _places(where, r, d_state, REVERSED, T)
    d2s = load_step_sizes(inputs, where, q, REVERSED, HALF, T)
    drives = without_B(d2s, xs, T)
    d2 = total(d2s, T)
    with_B, with_A = (), ()
    for _ in tl.static_range(T):
        with_B = with_B + (tl.zeros(d2s[0].shape, tl.float32),)
        with_A = with_A + (tl.zeros(d2s[0].shape, tl.float32),)
    for n in range(d_state):
        words, A = load_state(inputs, where, q, n, d_state, REVERSED, T)
        slot = (row * 2 + r) * d_state + n
        decays, product = _decays(d2s, A, T), tl.exp2(A * d2)
        h = _enter(decays, product, drives, words, entering, slot, where, dtype, REVERSED, CHAINED, T)
        hs = _states(decays, drives, words, h, dtype, T)
        s = _enter_back(decays, product, dys, words, flows, slot, where, dtype, REVERSED, CHAINED, T)
        steps = (d2s, drives, dys, decays)
        with_B, with_A, dA = _walk_back(with_B, with_A, steps, hs, words, A, s, part_at + 2 * n, places, dtype, T)
        tl.store(sums_at + (4 + q * d_state + n) * padded, tl.sum(dA, axis=0))
    dxs, dus, dbias = _finish(dxs, xs, d2s, with_B, with_A, HALF, T)
    store_segment(inputs[0], where, ordered(dus, REVERSED, T), T, 4, q)
    tl.store(sums_at + q * padded, tl.sum(dbias, axis=0))
    return ordered(dxs, REVERSED, T)


@triton.jit(do_not_specialize=[*SIZES, 'total_pixels', 'd_state'])
def scan_back(
    x, dy, u, projections, floats, entering, flows, dx, parts, partial, total_pixels,
    groups, chain, segments, length, height, width, channels, columns, d_state,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    CHAINED: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of a block, both routes of a pair.

    du2 takes the place of u.  ``parts`` (groups, pixels, 2, 2N) are the gradients of B and C, side by side, summed over
    the block's channels; ``partial`` (rows, 5 + 4N, groups * C) its sums over steps: dbias and dA of the routes, dD.
    Moves x, dy and u in, dx (in and out for the second pair), du2, parts and sums out, and if CHAINED what enters in.
    """
    row, _, _, where = locate(groups, chain, length, height, width, channels, columns, COLUMN, T, S, C)
    inputs = (u, projections, floats)
    xs = load_segment(x, where, T)
    dys = load_segment(dy, where, T)
    group, padded = tl.program_id(0) % groups, groups * C
    part_at = parts + (group.to(tl.int64) * total_pixels + where[0]) * (4 * d_state)
    sums_at = partial + row * (5 + 4 * d_state) * padded + group * C + tl.arange(0, C)
    dxs = ()
    if PAIR == 0:
        skip = tl.load(floats + (4 + 4 * d_state) * channels + where[3], where[4], 0.0)
        dD = tl.zeros([S, C], tl.float32)
        for t in tl.static_range(T):
            dy_t = dys[t].to(tl.float32)
            dxs = dxs + (skip * dy_t,)
            dD += xs[t].to(tl.float32) * dy_t
        tl.store(sums_at + (4 + 4 * d_state) * padded, tl.sum(dD, axis=0))
    else:
        dxs = as_float(load_segment(dx, where, T), T)
    dxs = _add_route(
        dxs, xs, dys, inputs, entering, flows, row, part_at, sums_at, padded, where, d_state, 2 * PAIR, 0,
        False, CHAINED, HALF, T,
    )  # fmt: skip
    dxs = _add_route(
        dxs, xs, dys, inputs, entering, flows, row, part_at, sums_at, padded, where, d_state, 2 * PAIR + 1, 1,
        SECOND_REVERSED, CHAINED, HALF, T,
    )  # fmt: skip
    store_segment(dx, where, dxs, T)
