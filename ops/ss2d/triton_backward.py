"""Triton kernels of the fused SS2D core, backward; vocabulary in ``triton_kernels.py``.

With g_t = dL/dh_t: g_t = C_t dy_t + s_{t+1}, s_t = decay_t g_t; s runs against the scan.  The state before a step is
not needed alone, as decay h_{t-1} = h_t - drive_t.
"""

import triton
import triton.language as tl

from .triton_kernels import (
    LN2,
    SIZES,
    as_float,
    entering_state,
    load_route,
    load_segment,
    locate,
    ordered,
    scan_carries,
    softplus2,
    softplus2_slope,
    states_at,
    store_block_carry,
    store_segment,
    unpack,
)


@triton.jit
def _leave_carry(
    dys, inputs, carries, row, where, q, r,
    REVERSED: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    us, words, bias, A = load_route(inputs, where, q, REVERSED, T)
    dys = ordered(dys, REVERSED, T)
    product = tl.full(us[0].shape, 1.0, tl.float32)
    end = tl.zeros(us[0].shape, tl.float32)
    for i in tl.static_range(T):
        _, C = unpack(words[T - 1 - i], inputs[1].dtype.element_ty)
        decay = tl.exp2(A * softplus2(us[T - 1 - i].to(tl.float32) + bias, HALF))
        end = decay * (C * dys[T - 1 - i].to(tl.float32) + end)
        product *= decay
    store_block_carry(carries, row * 2 + r, where, product, end, not REVERSED, S)


@triton.jit(do_not_specialize=SIZES)
def backward_carries(
    dy, u, projections, floats, products, ends, groups, chain, segments, length, height, width, channels, columns,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the carries of s of a block, both routes of a pair. Moves dy and u in."""
    row, _, _, where = locate(groups, chain, length, height, width, channels, columns, COLUMN, T, S, C)
    inputs, carries = (u, projections, floats), (products, ends)
    dys = load_segment(dy, where, T)
    _leave_carry(dys, inputs, carries, row, where, 2 * PAIR, 0, False, HALF, T, S)
    _leave_carry(dys, inputs, carries, row, where, 2 * PAIR + 1, 1, SECOND_REVERSED, HALF, T, S)


@triton.jit
def _rescan(us, xs, words, bias, A, h, dtype: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr):
    """Scan a segment again from ``h``: step sizes and the states after each step."""
    d2s, hs = (), ()
    for i in tl.static_range(T):
        d2 = softplus2(us[i].to(tl.float32) + bias, HALF)
        B, _ = unpack(words[i], dtype)
        h = tl.exp2(A * d2) * h + d2 * (xs[i].to(tl.float32) * B)
        d2s = d2s + (d2,)
        hs = hs + (h,)
    return d2s, hs


@triton.jit
def _carry_of_s(dys, words, A, d2s, dtype: tl.constexpr, T: tl.constexpr):
    """What a segment does to s: product and end."""
    product = tl.full(d2s[0].shape, 1.0, tl.float32)
    end = tl.zeros(d2s[0].shape, tl.float32)
    for i in tl.static_range(T):
        decay = tl.exp2(A * d2s[T - 1 - i])
        _, C = unpack(words[T - 1 - i], dtype)
        end = decay * (C * dys[T - 1 - i].to(tl.float32) + end)
        product *= decay
    return product, end


@triton.jit
def _add_route(
    dxs, xs, dys, inputs, entering, row, saved, parts, sums_at, padded, where, q, r,
    REVERSED: tl.constexpr, CHAINED: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of one route: adds to ``dxs``, stores all others.

    ``saved`` are the states, batch, segments and their number; ``parts`` where dB and dC go, which of these places
    exist, and their number 2 t + (0 for B, 1 for C); ``sums_at`` where the sums over steps go, in rows of ``padded``.
    """
    dtype: tl.constexpr = inputs[1].dtype.element_ty
    part_at, part_mask, part_lane = parts
    states, batch, segment, segments = saved
    us, words, bias, A = load_route(inputs, where, q, REVERSED, T)
    xs, dys, dxs = ordered(xs, REVERSED, T), ordered(dys, REVERSED, T), ordered(dxs, REVERSED, T)
    at, mask = states_at(states, batch, segment, segments, where, q)
    d2s, hs = _rescan(us, xs, words, bias, A, tl.load(at, mask, 0.0), dtype, HALF, T)
    product, end = _carry_of_s(dys, words, A, d2s, dtype, T)
    _, _, before, s = scan_carries(product, end, not REVERSED)
    if CHAINED:
        s += before * entering_state(entering, row * 2 + r, where)

    dA = tl.zeros(us[0].shape, tl.float32)
    dbias = tl.zeros(us[0].shape, tl.float32)
    part_sums = tl.zeros(part_mask.shape, tl.float32)
    dus, sums = (), ()
    for i in tl.static_range(T):
        d2, h = d2s[T - 1 - i], hs[T - 1 - i]
        x_i, dy_i = xs[T - 1 - i].to(tl.float32), dys[T - 1 - i].to(tl.float32)
        B, C = unpack(words[T - 1 - i], dtype)
        g = C * dy_i + s
        decay = tl.exp2(A * d2)
        s = decay * g
        g_d2 = g * d2
        B_x = x_i * B
        # decay times the state before; a difference of equals need not round to 0, and A may be huge
        carried = tl.where(decay == 0, 0.0, h - d2 * B_x)
        du = g * ((A * LN2) * carried + B_x) * softplus2_slope(d2, HALF)
        sums = (g_d2 * B + dxs[T - 1 - i],) + sums
        dus = (du,) + dus
        dA += g_d2 * carried
        dbias += du
        dB = tl.sum(g_d2 * x_i, axis=1, keep_dims=True)
        dC = tl.sum(h * dy_i, axis=1, keep_dims=True)
        step = i if REVERSED else T - 1 - i
        part_sums = tl.where(part_lane == 2 * step, dB, tl.where(part_lane == 2 * step + 1, dC, part_sums))
    store_segment(inputs[0], where, ordered(dus, REVERSED, T), T, 4, q)
    tl.store(part_at + 2 * q, part_sums, part_mask)
    tl.store(sums_at + q * padded, tl.sum(dA, axis=0))
    tl.store(sums_at + (4 + q) * padded, tl.sum(dbias, axis=0))
    return ordered(sums, REVERSED, T)


@triton.jit
def _locate_parts(parts, group, total_pixels, image, segment, length, height, width,
                  COLUMN: tl.constexpr, T: tl.constexpr, TP: tl.constexpr):  # fmt: skip
    """Where dB and dC of a block go: addresses of the first route, which exist, and their numbers."""
    lane = tl.arange(0, 2 * TP)[None, :]  # 2 t + (0 for B, 1 for C)
    step = segment * T + lane // 2
    if COLUMN:
        pixel = step % height * width + step // height
    else:
        pixel = step
    at = parts + (group.to(tl.int64) * total_pixels + image) * 8 + (pixel * 8 + lane % 2)
    return at, (lane < 2 * T) & (step < length), lane


@triton.jit(do_not_specialize=[*SIZES, 'total_pixels'])
def backward(
    x, dy, u, projections, floats, states, entering, dx, parts, partial, total_pixels,
    groups, chain, segments, length, height, width, channels, columns,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    CHAINED: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of a block, both routes of a pair.

    A segment is scanned again from its saved state, then s against the scan as the state in forward.  du2 takes the
    place of u.  ``parts`` (groups, pixels, 4, 2) are the gradients of B and C summed over the block's channels,
    ``partial`` (rows, 9, groups * C) its sums over steps: dA and dbias of the routes, dD.  TP is a power of two of T or
    more.  Moves x, dy, u and states in, dx (in and out for the second pair), du2 and the sums out.
    """
    row, batch, segment, where = locate(groups, chain, length, height, width, channels, columns, COLUMN, T, S, C)
    inputs, saved = (u, projections, floats), (states, batch, segment, segments)
    xs = load_segment(x, where, T)
    dys = load_segment(dy, where, T)
    group, padded = tl.program_id(0) % groups, groups * C
    sums_at = partial + row * 9 * padded + group * C + tl.arange(0, C)
    dxs = ()
    if PAIR == 0:
        skip = tl.load(floats + 8 * channels + where[3], where[4], 0.0)
        dD = tl.zeros([S, C], tl.float32)
        for t in tl.static_range(T):
            dy_t = dys[t].to(tl.float32)
            dxs = dxs + (skip * dy_t,)
            dD += xs[t].to(tl.float32) * dy_t
        tl.store(sums_at + 8 * padded, tl.sum(dD, axis=0))
    else:
        dxs = as_float(load_segment(dx, where, T), T)
    places = _locate_parts(parts, group, total_pixels, where[0], segment, length, height, width, COLUMN, T, TP)
    dxs = _add_route(
        dxs, xs, dys, inputs, entering, row, saved, places, sums_at, padded, where, 2 * PAIR, 0,
        False, CHAINED, HALF, T,
    )  # fmt: skip
    dxs = _add_route(
        dxs, xs, dys, inputs, entering, row, saved, places, sums_at, padded, where, 2 * PAIR + 1, 1,
        SECOND_REVERSED, CHAINED, HALF, T,
    )  # fmt: skip
    store_segment(dx, where, dxs, T)
