"""Triton kernels of the fused SS2D core for several states a channel, forward; vocabulary in ``triton_kernels.py``.

As for N = 1, with a loop over the states, whose number is no constant: one compilation serves any.  Step sizes and
drives of a segment stay in registers; B, C and A of a state are read as its turn comes.
"""

import triton
import triton.language as tl

from .triton_kernels import (
    SIZES,
    as_float,
    entering_state,
    load_segment,
    load_u,
    load_words,
    locate,
    ordered,
    scan_carries,
    softplus2,
    store_segment,
    unpack,
)


@triton.jit
def load_step_sizes(inputs, where, q, REVERSED: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr):
    """Step sizes d2 of a segment on route q, in its order."""
    us, bias = load_u(inputs, where, q, REVERSED, T)
    d2s = ()
    for i in tl.static_range(T):
        d2s = d2s + (softplus2(us[i].to(tl.float32) + bias, HALF),)
    return d2s


@triton.jit
def without_B(d2s, xs, T: tl.constexpr):
    """Drives of all states but for B: x B alone may overflow."""
    drives = ()
    for i in tl.static_range(T):
        drives = drives + (d2s[i] * xs[i].to(tl.float32),)
    return drives


@triton.jit
def load_state(inputs, where, q, n, d_state, REVERSED: tl.constexpr, T: tl.constexpr):
    """Words of B and C of state n on route q, in its order, and A."""
    _, projections, floats = inputs
    _, _, _, channel, inside, channels, _ = where
    A = tl.load(floats + (4 + q * d_state + n) * channels + channel, inside, 0.0)
    return load_words(projections, where, q, d_state - n, REVERSED, T), A


@triton.jit
def _scan(ys, d2s, drives, words, A, dtype: tl.constexpr, T: tl.constexpr):
    """Scan one state through a segment from zero.

    Returns:
        tuple: ``ys`` with C times the state after each step, C times the product of decays, and the last of both
        without C.
    """
    product = tl.full(d2s[0].shape, 1.0, tl.float32)
    state = tl.zeros(d2s[0].shape, tl.float32)
    outputs, gains = (), ()
    for i in tl.static_range(T):
        B, C = unpack(words[i], dtype)
        decay = tl.exp2(A * d2s[i])
        state = decay * state + drives[i] * B
        product *= decay
        outputs = outputs + (ys[i] + C * state,)
        gains = gains + (C * product,)
    return outputs, gains, state, product


@triton.jit
def store_carry(carries, slot, where, d2, A, end):
    """Leave the carry of a block for ``combine``: the product of the decays of steps that add up to d2, and the end.

    ``slot`` numbers (batch, chain, 2, N).
    """
    products, ends = carries
    _, _, _, channel, inside, channels, _ = where
    tl.store(products + slot * channels + channel, tl.exp2(A * d2), inside)
    tl.store(ends + slot * channels + channel, end, inside)


@triton.jit
def total(values, T: tl.constexpr):
    """Sum of a segment's values."""
    result = values[0]
    for i in tl.static_range(1, T):
        result += values[i]
    return result


@triton.jit
def _leave_carries(
    xs, inputs, carries, row, where, d_state, q, r, REVERSED: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr
):
    d2s = load_step_sizes(inputs, where, q, REVERSED, HALF, T)
    drives = without_B(d2s, ordered(xs, REVERSED, T), T)
    d2 = total(d2s, T)
    for n in range(d_state):
        words, A = load_state(inputs, where, q, n, d_state, REVERSED, T)
        end = tl.zeros(d2.shape, tl.float32)
        for i in tl.static_range(T):
            B, _ = unpack(words[i], inputs[1].dtype.element_ty)
            end = tl.exp2(A * d2s[i]) * end + drives[i] * B
        store_carry(carries, (row * 2 + r) * d_state + n, where, d2, A, end)


@triton.jit(do_not_specialize=[*SIZES, 'd_state'])
def leave_carries(
    x, u, projections, floats, products, ends,
    groups, chain, segments, length, height, width, channels, columns, d_state,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the carries of a block, a lone segment, both routes of a pair.

    Moves x and u in, 2 N values a channel and route out.
    """
    row, _, _, where = locate(groups, chain, length, height, width, channels, columns, COLUMN, T, S, C)
    inputs, carries = (u, projections, floats), (products, ends)
    xs = load_segment(x, where, T)
    _leave_carries(xs, inputs, carries, row, where, d_state, 2 * PAIR, 0, False, HALF, T)
    _leave_carries(xs, inputs, carries, row, where, d_state, 2 * PAIR + 1, 1, SECOND_REVERSED, HALF, T)


@triton.jit
def _add_route(
    ys, xs, inputs, entering, row, where, d_state, q, r,
    REVERSED: tl.constexpr, CHAINED: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Add the output of one route to ``ys``, a state after the other."""
    ys = ordered(ys, REVERSED, T)
    d2s = load_step_sizes(inputs, where, q, REVERSED, HALF, T)
    drives = without_B(d2s, ordered(xs, REVERSED, T), T)
    for n in range(d_state):
        words, A = load_state(inputs, where, q, n, d_state, REVERSED, T)
        outputs, gains, state, product = _scan(ys, d2s, drives, words, A, inputs[1].dtype.element_ty, T)
        _, _, before, state = scan_carries(product, state, REVERSED)
        if CHAINED:
            state += before * entering_state(entering, (row * 2 + r) * d_state + n, where)
        ys = ()
        for i in tl.static_range(T):
            ys = ys + (outputs[i] + gains[i] * state,)
    return ordered(ys, REVERSED, T)


@triton.jit(do_not_specialize=[*SIZES, 'd_state'])
def scan(
    x, u, projections, floats, entering, y,
    groups, chain, segments, length, height, width, channels, columns, d_state,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    CHAINED: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of a block, both routes of a pair.

    Moves x and u in, y out (in and out for the second pair), and if CHAINED the entering states in.
    """
    row, _, _, where = locate(groups, chain, length, height, width, channels, columns, COLUMN, T, S, C)
    inputs = (u, projections, floats)
    xs = load_segment(x, where, T)
    ys = ()
    if PAIR == 0:
        skip = tl.load(floats + (4 + 4 * d_state) * channels + where[3], where[4], 0.0)
        for t in tl.static_range(T):
            ys = ys + (skip * xs[t].to(tl.float32),)
    else:
        ys = as_float(load_segment(y, where, T), T)
    ys = _add_route(ys, xs, inputs, entering, row, where, d_state, 2 * PAIR, 0, False, CHAINED, HALF, T)
    ys = _add_route(ys, xs, inputs, entering, row, where, d_state, 2 * PAIR + 1, 1, SECOND_REVERSED, CHAINED, HALF, T)
    store_segment(y, where, ys, T)
