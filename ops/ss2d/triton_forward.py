"""Triton kernels of the fused SS2D core, forward; vocabulary in ``triton_kernels.py``."""

import triton
import triton.language as tl

from .triton_kernels import (
    SIZES,
    as_float,
    entering_state,
    load_route,
    load_segment,
    locate,
    ordered,
    scan_carries,
    softplus2,
    states_at,
    store_block_carry,
    store_segment,
    unpack,
)


@triton.jit
def _scan(us, xs, words, bias, A, dtype: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr):
    """Scan a segment from zero.

    Returns:
        tuple: C times the state after each step, C times the product of decays, and the last of both without C.
    """
    product = tl.full(us[0].shape, 1.0, tl.float32)
    state = tl.zeros(us[0].shape, tl.float32)
    outputs, gains = (), ()
    for i in tl.static_range(T):
        B, C = unpack(words[i], dtype)
        d2 = softplus2(us[i].to(tl.float32) + bias, HALF)
        decay = tl.exp2(A * d2)
        state = decay * state + d2 * xs[i].to(tl.float32) * B  # in this order: x B alone may overflow
        product *= decay
        outputs = outputs + (C * state,)
        gains = gains + (C * product,)
    return outputs, gains, state, product


@triton.jit
def _leave_carry(
    xs, inputs, carries, row, where, q, r,
    REVERSED: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    us, words, bias, A = load_route(inputs, where, q, REVERSED, T)
    _, _, state, product = _scan(us, ordered(xs, REVERSED, T), words, bias, A, inputs[1].dtype.element_ty, HALF, T)
    store_block_carry(carries, row * 2 + r, where, product, state, REVERSED, S)


@triton.jit(do_not_specialize=SIZES)
def forward_carries(
    x, u, projections, floats, products, ends, groups, chain, segments, length, height, width, channels, columns,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the carries of a block, both routes of a pair. Moves x and u in."""
    row, _, _, where = locate(groups, chain, length, height, width, channels, columns, COLUMN, T, S, C)
    inputs, carries = (u, projections, floats), (products, ends)
    xs = load_segment(x, where, T)
    _leave_carry(xs, inputs, carries, row, where, 2 * PAIR, 0, False, HALF, T, S)
    _leave_carry(xs, inputs, carries, row, where, 2 * PAIR + 1, 1, SECOND_REVERSED, HALF, T, S)


@triton.jit
def _add_route(
    ys, xs, inputs, entering, row, saved, where, q, r,
    REVERSED: tl.constexpr, CHAINED: tl.constexpr, SAVE: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Add the output of one route to ``ys``, and save the states.

    ``saved`` are the states, batch, segments and their number.
    """
    us, words, bias, A = load_route(inputs, where, q, REVERSED, T)
    xs, ys = ordered(xs, REVERSED, T), ordered(ys, REVERSED, T)
    outputs, gains, state, product = _scan(us, xs, words, bias, A, inputs[1].dtype.element_ty, HALF, T)
    sums = ()
    for i in tl.static_range(T):
        sums = sums + (outputs[i] + ys[i],)
    _, _, before, state = scan_carries(product, state, REVERSED)
    if CHAINED:
        state += before * entering_state(entering, row * 2 + r, where)
    if SAVE:
        states, batch, segment, segments = saved
        at, mask = states_at(states, batch, segment, segments, where, q)
        tl.store(at, state, mask)
    result = ()
    for i in tl.static_range(T):
        result = result + (gains[i] * state + sums[i],)
    return ordered(result, REVERSED, T)


@triton.jit(do_not_specialize=SIZES)
def forward(
    x, u, projections, floats, entering, y, states,
    groups, chain, segments, length, height, width, channels, columns,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    CHAINED: tl.constexpr, SAVE: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of a block, both routes of a pair.

    A segment is scanned from zero; its output is affine in the state entering it, and the factors are kept until the
    block's carries have met.  Moves x and u in, y out (in and out for the second pair), states out if SAVE.
    """
    row, batch, segment, where = locate(groups, chain, length, height, width, channels, columns, COLUMN, T, S, C)
    inputs, saved = (u, projections, floats), (states, batch, segment, segments)
    xs = load_segment(x, where, T)
    ys = ()
    if PAIR == 0:
        skip = tl.load(floats + 8 * channels + where[3], where[4], 0.0)
        for t in tl.static_range(T):
            ys = ys + (skip * xs[t].to(tl.float32),)
    else:
        ys = as_float(load_segment(y, where, T), T)
    ys = _add_route(ys, xs, inputs, entering, row, saved, where, 2 * PAIR, 0, False, CHAINED, SAVE, HALF, T)
    ys = _add_route(
        ys, xs, inputs, entering, row, saved, where, 2 * PAIR + 1, 1, SECOND_REVERSED, CHAINED, SAVE, HALF, T
    )
    store_segment(y, where, ys, T)
