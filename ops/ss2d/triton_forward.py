"""Triton kernels of the fused SS2D core, forward; vocabulary in ``triton_kernels.py``."""

import triton
import triton.language as tl

from .triton_kernels import (
    SIZES,
    as_float,
    load_route,
    load_segment,
    load_words,
    ordered,
    place,
    scan_carries,
    softplus2,
    store_block_carry,
    store_segment,
    unpack,
    walk,
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
    xs, u, maps, floats, products, ends, row, image, pixels, exist, channel, inside, channels, columns,
    q, r, REVERSED: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    us, bias, A = load_route(u, floats, image, pixels, exist, channel, inside, channels, q, REVERSED, T)
    words = load_words(maps, image, pixels, exist, columns, q, REVERSED, T)
    _, _, state, product = _scan(us, ordered(xs, REVERSED, T), words, bias, A, maps.dtype.element_ty, HALF, T)
    store_block_carry(products, ends, row, channel, inside, channels, product, state, r, REVERSED, S)


@triton.jit(do_not_specialize=SIZES)
def forward_carries(
    x, u, maps, floats, products, ends, groups, chain, segments, length, height, width, channels, columns,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the carries of a block, both routes of a pair. Moves x and u in."""
    row, batch, segment, channel, inside = place(groups, chain, channels, length, T, S, C)
    image = batch * length
    pixels, exist = walk(segment * T, length, height, width, COLUMN, T)
    xs = load_segment(x + image * channels, pixels, exist, inside, channels, channel, T)
    _leave_carry(
        xs, u, maps, floats, products, ends, row, image, pixels, exist, channel, inside, channels, columns,
        2 * PAIR, 0, False, HALF, T, S,
    )  # fmt: skip
    _leave_carry(
        xs, u, maps, floats, products, ends, row, image, pixels, exist, channel, inside, channels, columns,
        2 * PAIR + 1, 1, SECOND_REVERSED, HALF, T, S,
    )  # fmt: skip


@triton.jit
def _add_route(
    ys, xs, u, maps, floats, entering, states, row, batch, segment, segments, image, pixels, exist, channel, inside,
    channels, columns, q, r, REVERSED: tl.constexpr, CHAINED: tl.constexpr, SAVE: tl.constexpr, HALF: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Add the output of one route to ``ys``, and save the states."""
    us, bias, A = load_route(u, floats, image, pixels, exist, channel, inside, channels, q, REVERSED, T)
    words = load_words(maps, image, pixels, exist, columns, q, REVERSED, T)
    xs, ys = ordered(xs, REVERSED, T), ordered(ys, REVERSED, T)
    outputs, gains, state, product = _scan(us, xs, words, bias, A, maps.dtype.element_ty, HALF, T)
    sums = ()
    for i in tl.static_range(T):
        sums = sums + (outputs[i] + ys[i],)
    _, _, before, state = scan_carries(product, state, REVERSED)
    if CHAINED:
        state += before * tl.load(entering + (row * 2 + r) * channels + channel, inside, 0.0)
    if SAVE:
        at = states + batch * segments * 4 * channels + ((segment * 4 + q) * channels + channel)
        tl.store(at, state, inside & (segment < segments))
    result = ()
    for i in tl.static_range(T):
        result = result + (gains[i] * state + sums[i],)
    return ordered(result, REVERSED, T)


@triton.jit(do_not_specialize=SIZES)
def forward(
    x, u, maps, floats, entering, y, states, groups, chain, segments, length, height, width, channels, columns,
    PAIR: tl.constexpr, COLUMN: tl.constexpr, SECOND_REVERSED: tl.constexpr, HALF: tl.constexpr,
    CHAINED: tl.constexpr, SAVE: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of a block, both routes of a pair.

    A segment is scanned from zero; its output is affine in the state entering it, and the factors are kept until the
    block's carries have met.  Moves x and u in, y out (in and out for the second pair), states out if SAVE.
    """
    row, batch, segment, channel, inside = place(groups, chain, channels, length, T, S, C)
    image = batch * length
    pixels, exist = walk(segment * T, length, height, width, COLUMN, T)
    xs = load_segment(x + image * channels, pixels, exist, inside, channels, channel, T)
    y_image = y + image * channels
    ys = ()
    if PAIR == 0:
        skip = tl.load(floats + 8 * channels + channel, inside, 0.0)
        for t in tl.static_range(T):
            ys = ys + (skip * xs[t].to(tl.float32),)
    else:
        ys = as_float(load_segment(y_image, pixels, exist, inside, channels, channel, T), T)
    ys = _add_route(
        ys, xs, u, maps, floats, entering, states, row, batch, segment, segments, image, pixels, exist, channel, inside,
        channels, columns, 2 * PAIR, 0, False, CHAINED, SAVE, HALF, T,
    )  # fmt: skip
    ys = _add_route(
        ys, xs, u, maps, floats, entering, states, row, batch, segment, segments, image, pixels, exist, channel, inside,
        channels, columns, 2 * PAIR + 1, 1, SECOND_REVERSED, CHAINED, SAVE, HALF, T,
    )  # fmt: skip
    store_segment(y_image, pixels, exist, inside, channels, channel, ys, T)
