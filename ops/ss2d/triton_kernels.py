"""Shared pieces of the Triton kernels of the fused SS2D core: parameters, segments, carries.

Vocabulary and scaling are those of ``csrc/ss2d/common.cuh``.  A *pair* is two routes over one pixel order; routes
lie in pair order (0, 2 | 1, 3) with index q = 2 * pair + r.  A *segment* is T consecutive pixels of the order.  A
*block*, one program, is S segments of C channels; an image is a chain of blocks.  With
u2 = log2(e) (Wdt dt + bias): d2 = log2(1 + 2^u2), decay = 2^(A d2), drive = d2 (ln 2 B) x.  ``floats`` are the
parameters of the state, (4 + 4N + 1, channels): bias of the routes, A of the routes and states, the sum of Ds.

A value of a step is a tile [S, C], and a segment is a tuple of T tiles, so that a scan runs over tiles and needs no
particular layout; only the carries of a block's segments meet in an associative scan, once a route.  Steps beyond the
image and channels beyond the last load zeros, which makes them inert: no drive, no output, no gradient.
"""

import triton
import triton.language as tl

from ..triton_softplus import log1p_ratio

SIZES = ['groups', 'chain', 'segments', 'length', 'height', 'width']  # change from image to image: no recompilation
# Right operands only: Triton's interpreter makes a constexpr of constexpr * tensor.
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


# ---- parameters -----------------------------------------------------------------------------------------------------
@triton.jit
def prepare(
    x_proj, dt_proj, dt_bias, A_logs, Ds, weight, dt_matrix, floats, channels, dt_rank, dt_columns, columns, d_state,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK channels of one column of one route.

    ``weight`` is (4, columns, channels), columns dt, zeros, then B and C of each state side by side; ``dt_matrix``
    (4, dt_columns, channels).
    """
    q, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    route = q % 2 * 2 + q // 2
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    is_dt, word = column < dt_rank, column - (columns - 2 * d_state)
    is_B, is_C = (word >= 0) & (word % 2 == 0), (word >= 0) & (word % 2 == 1)
    row = tl.where(word >= 0, dt_rank + word % 2 * d_state + word // 2, column)
    at = x_proj + (route * (dt_rank + 2 * d_state) + row) * channels + channel
    value = tl.load(at, inside & (is_dt | is_B | is_C), 0.0) * tl.where(is_B, LN2, 1.0)
    tl.store(weight + (q * columns + column) * channels + channel, value.to(weight.dtype.element_ty), inside)
    dt = tl.load(dt_proj + (route * channels + channel) * dt_rank + column, inside & is_dt, 0.0) * LOG2E
    to = dt_matrix + (q * dt_columns + column) * channels + channel
    tl.store(to, dt.to(dt_matrix.dtype.element_ty), inside & (column < dt_columns))
    own = route * channels + channel
    state = inside & (column < d_state)
    A = -tl.exp(tl.load(A_logs + own * d_state + column, state, 0.0))
    tl.store(floats + (4 + q * d_state + column) * channels + channel, A, state)
    once = inside & (column == 0)
    tl.store(floats + q * channels + channel, tl.load(dt_bias + own, once, 0.0) * LOG2E, once)
    once = once & (q == 0)
    skip = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(4):
        skip += tl.load(Ds + k * channels + channel, once, 0.0)
    tl.store(floats + (4 + 4 * d_state) * channels + channel, skip, once)


# ---- special functions ----------------------------------------------------------------------------------------------
@triton.jit
def softplus2(u, HALF: tl.constexpr):
    """log2(1 + 2^u) = max(u, 0) + log2(1 + z), z = 2^-|u|."""
    z = tl.exp2(-tl.abs(u))
    return z * log1p_ratio(z, True, HALF) + tl.maximum(u, 0.0)


@triton.jit
def softplus2_slope(d2, HALF: tl.constexpr):
    """The derivative of softplus2 in its value, 1 - 2^-d2; a series where that cancels."""
    slope = 1.0 - tl.exp2(-d2)
    if not HALF:
        series = d2 * -0.009618129107628477 + 0.05550410866482158
        series = d2 * series - 0.2402265069591007
        series = d2 * series + 0.6931471805599453
        slope = tl.where(d2 < 0.125, d2 * series, slope)
    return slope


# ---- segments -------------------------------------------------------------------------------------------------------
@triton.jit
def locate(
    groups, chain, length, height, width, channels, columns,
    COLUMN: tl.constexpr, T: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What a program works on.

    Returns:
        tuple: Row of (batch, chain), batch, segments [S, 1], and ``where``: index of the image's first pixel, memory
        indices of the T steps, which of them exist, channels [1, C], which of them exist, their number, and the number
        of columns.
    """
    row = tl.program_id(0) // groups
    batch = (row // chain).to(tl.int64)
    segment = row % chain * S + tl.arange(0, S)[:, None]
    channel = tl.program_id(0) % groups * C + tl.arange(0, C)[None, :]
    pixels, exist = walk(segment * T, length, height, width, COLUMN, T)
    where = (batch * length, pixels, exist, channel, channel < channels, channels, columns)
    return row.to(tl.int64), batch, segment, where


@triton.jit
def walk(first, length, height, width, COLUMN: tl.constexpr, T: tl.constexpr):
    """Memory indices of the T steps from ``first``, any beyond the image, and which steps exist."""
    start = tl.minimum(first, length - 1)
    if COLUMN:
        pixel = start % height * width + start // height
    else:
        pixel = start
    pixels, exist = (), ()
    for t in tl.static_range(T):
        pixels = pixels + (pixel,)
        exist = exist + (first + t < length,)
        if COLUMN:
            pixel += width
            pixel = tl.where(pixel >= length, pixel - (length - 1), pixel)
        else:
            pixel += 1
    return pixels, exist


@triton.jit
def ordered(values, REVERSED: tl.constexpr, T: tl.constexpr):
    """A segment's values in the order of a route, or back."""
    result = ()
    for t in tl.static_range(T):
        if REVERSED:
            result = (values[t],) + result
        else:
            result = result + (values[t],)
    return result


@triton.jit
def load_pixels(base, pixels, exist, inside, stride, offset, T: tl.constexpr):
    """Values at ``offset`` in pixels of ``stride`` elements; zero where a step or a channel does not exist."""
    values = ()
    for t in tl.static_range(T):
        values = values + (tl.load(base + (pixels[t] * stride + offset), exist[t] & inside, 0.0),)
    return values


@triton.jit
def load_segment(base, where, T: tl.constexpr):
    """A segment of a map (pixels, channels)."""
    image, pixels, exist, channel, inside, channels, _ = where
    return load_pixels(base + image * channels, pixels, exist, inside, channels, channel, T)


@triton.jit
def store_segment(base, where, values, T: tl.constexpr, ROUTES: tl.constexpr = 1, q=0):
    """Store what exists of a segment; of route q if the map has several."""
    image, pixels, exist, channel, inside, channels, _ = where
    for t in tl.static_range(T):
        at = base + image * ROUTES * channels + (pixels[t] * (ROUTES * channels) + (q * channels + channel))
        tl.store(at, values[t].to(base.dtype.element_ty), exist[t] & inside)


@triton.jit
def as_float(values, T: tl.constexpr):
    """A segment's values in float32."""
    result = ()
    for t in tl.static_range(T):
        result = result + (values[t].to(tl.float32),)
    return result


@triton.jit
def load_words(projections, where, q, last, REVERSED: tl.constexpr, T: tl.constexpr):
    """B and C of the steps in the order of route q, two values to a word; a word serves all channels.

    ``last`` counts the states from behind, from 1.
    """
    image, pixels, exist, _, _, _, columns = where
    if projections.dtype.element_ty == tl.float32:
        words = projections.to(tl.pointer_type(tl.int64), bitcast=True)
    else:
        words = projections.to(tl.pointer_type(tl.int32), bitcast=True)
    row = columns // 2
    values = load_pixels(words + image * 4 * row, pixels, exist, True, 4 * row, q * row + row - last, T)
    return ordered(values, REVERSED, T)


@triton.jit
def unpack(word, dtype: tl.constexpr):
    """The two values of a word, the one at the lower address first."""
    if dtype == tl.float32:
        first = (word & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        second = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif dtype == tl.bfloat16:  # the upper half of a float32
        first = (word << 16).to(tl.float32, bitcast=True)
        second = ((word >> 16) << 16).to(tl.float32, bitcast=True)
    else:
        first = (word & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def load_u(inputs, where, q, REVERSED: tl.constexpr, T: tl.constexpr):
    """u2 without bias of route q, in its order, and the bias."""
    u, _, floats = inputs
    image, pixels, exist, channel, inside, channels, _ = where
    us = load_pixels(u + image * 4 * channels, pixels, exist, inside, 4 * channels, q * channels + channel, T)
    return ordered(us, REVERSED, T), tl.load(floats + q * channels + channel, inside, 0.0)


@triton.jit
def load_route(inputs, where, q, REVERSED: tl.constexpr, T: tl.constexpr):
    """What a route is scanned from, in its order: u2 without bias, words of B and C, bias and A."""
    _, projections, floats = inputs
    _, _, _, channel, inside, channels, _ = where
    us, bias = load_u(inputs, where, q, REVERSED, T)
    A = tl.load(floats + (4 + q) * channels + channel, inside, 0.0)
    return us, load_words(projections, where, q, 1, REVERSED, T), bias, A


# ---- carries --------------------------------------------------------------------------------------------------------
@triton.jit
def _append(product, end, before_product, before_end, last_product, last_end, last_before_product, last_before_end):
    """A stretch and the next one: its state goes s -> product s + end, that before its last segment likewise."""
    return (
        product * last_product,
        last_product * end + last_end,
        product * last_before_product,
        last_before_product * end + last_before_end,
    )


@triton.jit
def scan_carries(product, end, REVERSED: tl.constexpr):
    """Scan the carries of segments along axis 0.

    Returns:
        tuple: Product and end up to each segment with it, then without it.
    """
    ones = tl.full(product.shape, 1.0, tl.float32)
    return tl.associative_scan((product, end, ones, tl.zeros_like(end)), 0, _append, reverse=REVERSED)


@triton.jit
def store_block_carry(carries, slot, where, product, end, REVERSED: tl.constexpr, S: tl.constexpr):
    """Leave the carry of all of a block's segments in ``carries``, products and ends, for :func:`combine`.

    ``slot`` numbers (batch, chain, 2, N).
    """
    products, ends = carries
    _, _, _, channel, inside, channels, _ = where
    product, end, _, _ = scan_carries(product, end, REVERSED)
    lane = tl.arange(0, S)[:, None]
    last = inside & (lane == (0 if REVERSED else S - 1))
    at = slot * channels + channel + lane * 0
    tl.store(products + at, product, last)
    tl.store(ends + at, end, last)


@triton.jit
def entering_state(entering, slot, where):
    """The state that enters the block on a route, of :func:`combine`."""
    _, _, _, channel, inside, channels, _ = where
    return tl.load(entering + slot * channels + channel, inside, 0.0)


@triton.jit
def states_at(states, batch, segment, segments, where, q):
    """Where the states entering the segments are saved, (batch, segments, 4, channels), and which of them exist."""
    _, _, _, channel, inside, channels, _ = where
    at = states + batch * segments * 4 * channels + ((segment * 4 + q) * channels + channel)
    return at, inside & (segment < segments)


@triton.jit
def combine(
    products, ends, entering, groups, chain, channels, d_state,
    FIRST_REVERSED: tl.constexpr, SECOND_REVERSED: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program: C channels of one route and state of an image, K blocks of its chain at a time.

    ``products`` and ``ends`` (batch, chain, 2, N, channels) are the blocks' carries, ``entering`` the states before
    them.
    """
    group, own, slots = tl.program_id(0) % groups, tl.program_id(0) // groups % (2 * d_state), 2 * d_state
    image = (tl.program_id(0) // (slots * groups)).to(tl.int64) * chain * slots * channels
    channel = group * C + tl.arange(0, C)[None, :]
    lane = tl.arange(0, K)[:, None]
    reversed_ = ((own < d_state) & FIRST_REVERSED) | ((own >= d_state) & SECOND_REVERSED)
    state = tl.zeros([1, C], tl.float32)
    for first in range(0, chain, K):
        i = first + lane
        mask = (i < chain) & (channel < channels)
        at = (tl.where(reversed_, chain - 1 - i, i) * slots + own) * channels + channel
        product = tl.load(products + image + at, mask, 1.0)
        end = tl.load(ends + image + at, mask, 0.0)
        product, end, before_product, before_end = scan_carries(product, end, False)
        tl.store(entering + image + at, before_product * state + before_end, mask)
        state = tl.sum(tl.where(lane == K - 1, product * state + end, 0.0), axis=0, keep_dims=True)
