"""Kernels of the Mamba-2 scan: states between chunks, outputs of chunks, gradients of chunks, and sums over routes.

The equations are those of chunked.py, in powers of two.  A program finds the pixels of its steps by the route of its
group, so that nothing is laid out in memory for a route.  cum, the sum of dt A in a chunk, is float64 (ACC) where x is
float32: its differences lose digits.  NARROW: products round what was computed to the dtype of x; else they take it as
float32, of which PRECISION says how many bits count.
"""

import triton
import triton.language as tl

from ..selective_scan.triton import _softplus

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _pixels(t, group, height, width, length, COLUMN: tl.constexpr, REVERSE: tl.constexpr, SMALL: tl.constexpr):
    """The pixel at which the route of a group is at step t; COLUMN and REVERSE have a bit a route.

    SMALL: a map of at most 2^20 pixels and tensors of which an image has less than 2^31 elements; then float32 divides
    exactly, and offsets within an image have 32 bits.
    """
    if REVERSE != 0:
        t = tl.where((REVERSE >> group) & 1 != 0, length - 1 - t, t)
    if COLUMN != 0:
        if SMALL:
            column = ((t.to(tl.float32) + 0.5) * (1.0 / height)).to(tl.int32)
        else:
            column = t // height
        t = tl.where((COLUMN >> group) & 1 != 0, (t - column * height) * width + column, t)
    return t if SMALL else t.to(tl.int64)


@triton.jit
def _steps(at, bias, mask, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """dt and its slope; 0 beyond the last step, which then changes nothing. ``bias`` is broadcast."""
    x = tl.load(at, mask, 0.0).to(tl.float32)
    slope = tl.full(x.shape, 1.0, tl.float32)
    if HAS_BIAS:
        x += bias
    if SOFTPLUS:
        y, z = _softplus(x)
        slope = tl.where(x >= 0, 1.0, z) / (1.0 + z)
        x = y
    return tl.where(mask, x, 0.0), slope


@triton.jit
def _dot(a, b, NARROW: tl.constexpr, PRECISION: tl.constexpr, RAW: tl.constexpr):
    """a b, of which at least one was computed; RAW is the dtype of x."""
    if NARROW:
        return tl.dot(a.to(RAW), b.to(RAW))
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def walk(
    value, matrix, dt, A, bias, first, states, last,
    value_b, value_l, matrix_b, matrix_l, matrix_g, dt_b, dt_l,
    groups, heads, channels, d_state, height, width, length, chunks,
    SHARED: tl.constexpr, COLUMN: tl.constexpr, REVERSE: tl.constexpr, SMALL: tl.constexpr, UNIT: tl.constexpr,
    BACKWARD: tl.constexpr, HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of a group, all chunks, one after the other; the state (HEADS P, N) stays in registers.

    Forward: the states before each chunk, of x and B.  BACKWARD: from the last chunk to the first, the gradients of
    the states after each chunk, of the gradient of y and of C.  Moves value and matrix in, the states out.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, group = pair // groups, (pair % groups).to(tl.int32)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    valid = head < heads
    head = tl.minimum(head, heads - 1)
    own = group * heads + head  # among all heads
    p, n, q = tl.arange(0, P), tl.arange(0, N), tl.arange(0, Q)
    columns = head if SHARED else own
    value_at = value + batch * value_b
    value_of = (columns * channels)[None, :, None] + p[None, None, :]
    value_mask = valid[None, :, None] & (p < channels)[None, None, :]
    matrix_at = matrix + (batch * matrix_b + group * matrix_g) * UNIT
    dt_at = dt + batch * dt_b
    rate = (tl.load(A + own) * _LOG2E).to(ACC)
    shift = tl.load(bias + own)[None, :] if HAS_BIAS else 0.0
    rows = tl.reshape((own * channels)[:, None] + p[None, :], [HEADS * P])
    row_mask = tl.reshape(valid[:, None] & (p < channels)[None, :], [HEADS * P])
    inner = rows[:, None] * d_state + n[None, :]
    inner_mask = row_mask[:, None] & (n < d_state)[None, :]
    size = groups * heads * channels * d_state  # of a state of all heads
    if HAS_FIRST:
        state = tl.load(first + batch * size + inner, inner_mask, 0.0)
    else:
        state = tl.zeros([HEADS * P, N], tl.float32)
    for step in range(0, chunks):
        chunk = chunks - 1 - step if BACKWARD else step
        tl.store(states + (batch * chunks + chunk) * size + inner, state.to(states.dtype.element_ty), inner_mask)
        t = chunk * Q + q
        inside = t < length
        pixel = _pixels(t, group, height, width, length, COLUMN, REVERSE, SMALL)
        steps, _ = _steps(
            dt_at + (pixel[:, None] * dt_l + own[None, :]), shift, inside[:, None] & valid[None, :], HAS_BIAS, SOFTPLUS
        )
        decay = steps.to(ACC) * rate[None, :]
        cum, total = tl.cumsum(decay, axis=0), tl.sum(decay, axis=0)
        if BACKWARD:
            weight = tl.exp2(cum.to(tl.float32))
        else:
            weight = steps * tl.exp2((total[None, :] - cum).to(tl.float32))
        v = tl.load(value_at + (pixel[:, None, None] * value_l + value_of), inside[:, None, None] & value_mask, 0.0)
        m = tl.load(
            matrix_at + (pixel[:, None] * (matrix_l * UNIT) + n[None, :]), inside[:, None] & (n < d_state)[None, :], 0.0
        )
        v = tl.reshape(v.to(tl.float32) * weight[:, :, None], [Q, HEADS * P])
        left = tl.exp2(total.to(tl.float32))[:, None] + tl.zeros([HEADS, P], tl.float32)
        added = _dot(tl.trans(v), m, NARROW, PRECISION, matrix.dtype.element_ty)
        state = state * tl.reshape(left, [HEADS * P])[:, None] + added
    if HAS_LAST:
        tl.store(last + batch * size + inner, state, inner_mask)


@triton.jit
def outputs(
    x, dt, A, B, C, D, bias, states, out,
    x_b, x_l, dt_b, dt_l, B_b, B_l, B_g, C_b, C_l, C_g,
    groups, heads, turns, channels, d_state, height, width, length, chunks,
    SHARED: tl.constexpr, COLUMN: tl.constexpr, REVERSE: tl.constexpr, SMALL: tl.constexpr, UNIT: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of a group, ``turns`` heads one after the other, which share C B^T.

    Moves B and C in once, x and the states before the chunk in, the output out.
    """
    place = tl.program_id(0).to(tl.int64)
    chunk, pair = (place % chunks).to(tl.int32), place // chunks
    batch, group = pair // groups, (pair % groups).to(tl.int32)
    p, n, q = tl.arange(0, P), tl.arange(0, N), tl.arange(0, Q)
    t = chunk * Q + q
    inside = t < length
    pixel = _pixels(t, group, height, width, length, COLUMN, REVERSE, SMALL)
    wide = inside[:, None] & (n < d_state)[None, :]
    b = tl.load(B + (batch * B_b + group * B_g) * UNIT + (pixel[:, None] * (B_l * UNIT) + n[None, :]), wide, 0.0)
    c = tl.load(C + (batch * C_b + group * C_g) * UNIT + (pixel[:, None] * (C_l * UNIT) + n[None, :]), wide, 0.0)
    pairs = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    narrow = inside[:, None] & (p < channels)[None, :]
    state_mask = (p < channels)[:, None] & (n < d_state)[None, :]
    for turn in range(0, tl.minimum(turns, heads - tl.program_id(1) * turns)):
        head = tl.program_id(1) * turns + turn
        own = group * heads + head
        column = (head if SHARED else own) * channels
        shift = tl.load(bias + own) if HAS_BIAS else 0.0
        steps, _ = _steps(dt + batch * dt_b + (pixel * dt_l + own), shift, inside, HAS_BIAS, SOFTPLUS)
        cum = tl.cumsum(steps.to(ACC) * (tl.load(A + own) * _LOG2E).to(ACC), axis=0)
        gap = (cum[:, None] - cum[None, :]).to(tl.float32)
        weights = pairs * tl.exp2(tl.where(q[:, None] >= q[None, :], gap, float('-inf'))) * steps[None, :]
        v = tl.load(x + batch * x_b + (pixel[:, None] * x_l + column + p[None, :]), narrow, 0.0)
        y = _dot(weights, v, NARROW, PRECISION, x.dtype.element_ty)
        if HAS_STATE:
            before = states + ((batch * chunks + chunk) * groups * heads + own) * channels * d_state
            h = tl.load(before + (p[:, None] * d_state + n[None, :]), state_mask, 0.0)
            y += _dot(c, tl.trans(h), NARROW, PRECISION, x.dtype.element_ty) * tl.exp2(cum.to(tl.float32))[:, None]
        if HAS_D:
            y += tl.load(D + own * channels + p, p < channels, 0.0)[None, :] * v.to(tl.float32)
        at = pixel[:, None] * (groups * heads * channels) + own * channels + p[None, :]
        tl.store(out + batch * length * groups * heads * channels + at, y.to(out.dtype.element_ty), narrow)


@triton.jit
def gradients(
    dy, x, dt, A, B, C, D, bias, states, flows, dx, ddt, dB, dC, sums, dD,
    dy_b, dy_l, x_b, x_l, dt_b, dt_l, B_b, B_l, B_g, C_b, C_l, C_g,
    sequences, groups, heads, turns, channels, d_state, height, width, length, chunks,
    SHARED: tl.constexpr, COLUMN: tl.constexpr, REVERSE: tl.constexpr, SMALL: tl.constexpr, UNIT: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_FLOW: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: a chunk of a group, ``turns`` heads one after the other; the formulas of chunked.py.

    ``dB`` and ``dC`` have a part for each set of heads, ``sums`` (of A and bias) and ``dD`` one for each chunk.  Moves
    B, C, x, dy, states and flows in, dx and ddt and the parts out.
    """
    RAW: tl.constexpr = x.dtype.element_ty
    place = tl.program_id(0).to(tl.int64)
    chunk, pair = (place % chunks).to(tl.int32), place // chunks
    batch, group = pair // groups, (pair % groups).to(tl.int32)
    p, n, q = tl.arange(0, P), tl.arange(0, N), tl.arange(0, Q)
    t = chunk * Q + q
    inside = t < length
    pixel = _pixels(t, group, height, width, length, COLUMN, REVERSE, SMALL)
    wide = inside[:, None] & (n < d_state)[None, :]
    b = tl.load(B + (batch * B_b + group * B_g) * UNIT + (pixel[:, None] * (B_l * UNIT) + n[None, :]), wide, 0.0)
    c = tl.load(C + (batch * C_b + group * C_g) * UNIT + (pixel[:, None] * (C_l * UNIT) + n[None, :]), wide, 0.0)
    pairs = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    narrow = inside[:, None] & (p < channels)[None, :]
    state_mask = (p < channels)[:, None] & (n < d_state)[None, :]
    dpairs = tl.zeros([Q, Q], tl.float32)
    sum_B = tl.zeros([Q, N], tl.float32)
    sum_C = tl.zeros([Q, N], tl.float32)
    for turn in range(0, tl.minimum(turns, heads - tl.program_id(1) * turns)):
        head = tl.program_id(1) * turns + turn
        own = group * heads + head
        column = (head if SHARED else own) * channels
        shift = tl.load(bias + own) if HAS_BIAS else 0.0
        rate = tl.load(A + own)
        steps, slope = _steps(dt + batch * dt_b + (pixel * dt_l + own), shift, inside, HAS_BIAS, SOFTPLUS)
        log = steps.to(ACC) * (rate * _LOG2E).to(ACC)
        cum, total = tl.cumsum(log, axis=0), tl.sum(log, axis=0)
        gap = (cum[:, None] - cum[None, :]).to(tl.float32)
        decays = tl.exp2(tl.where(q[:, None] >= q[None, :], gap, float('-inf')))
        v = tl.load(x + batch * x_b + (pixel[:, None] * x_l + column + p[None, :]), narrow, 0.0)
        g = tl.load(dy + batch * dy_b + (pixel[:, None] * dy_l + column + p[None, :]), narrow, 0.0)
        if g.dtype == RAW:
            pulled = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        else:
            pulled = _dot(g, tl.trans(v), NARROW, PRECISION, RAW)
        pulled *= decays * steps[None, :]
        dpairs += pulled
        ddrive = _dot(tl.trans(pairs * decays), g, NARROW, PRECISION, RAW)
        pulled = tl.where(q[:, None] > q[None, :], pulled * pairs, 0.0)
        along = tl.sum(pulled, axis=1) - tl.sum(pulled, axis=0)
        at = ((batch * chunks + chunk) * groups * heads + own) * channels
        through = tl.zeros([Q], tl.float32)
        if HAS_STATE:
            h = tl.load(states + at * d_state + (p[:, None] * d_state + n[None, :]), state_mask, 0.0)
            dC_state = _dot(g, h, NARROW, PRECISION, RAW) * tl.exp2(cum.to(tl.float32))[:, None]
            sum_C += dC_state
            along += tl.sum(dC_state * c.to(tl.float32), axis=1)
        if HAS_FLOW:
            flow = tl.load(flows + at * d_state + (p[:, None] * d_state + n[None, :]), state_mask, 0.0)
            rest = tl.exp2((total - cum).to(tl.float32))
            ddrive += _dot(b, tl.trans(flow), NARROW, PRECISION, RAW) * rest[:, None]
            dB_state = _dot(v, flow, NARROW, PRECISION, RAW) * (rest * steps)[:, None]
            sum_B += dB_state
            later = tl.sum(dB_state * b.to(tl.float32), axis=1)
            through += tl.cumsum(later, axis=0) - later
            if HAS_STATE:
                kept = tl.sum(tl.sum(flow.to(tl.float32) * h.to(tl.float32), axis=1), axis=0)
                through += tl.exp2(total.to(tl.float32)) * kept
        dlog = tl.cumsum(along, axis=0, reverse=True) + through
        v, g = v.to(tl.float32), g.to(tl.float32)
        grad_dt = (tl.sum(v * ddrive, axis=1) + rate * dlog) * slope
        grad_dt = tl.where(inside, grad_dt, 0.0)
        grad_x = steps[:, None] * ddrive
        if HAS_D:
            grad_x += tl.load(D + own * channels + p, p < channels, 0.0)[None, :] * g
        row, image = pixel * (groups * heads) + own, batch * length * groups * heads
        at = row[:, None] * channels + p[None, :]
        tl.store(dx + image * channels + at, grad_x.to(dx.dtype.element_ty), narrow)
        tl.store(ddt + image + row, grad_dt.to(ddt.dtype.element_ty), inside)
        part = (batch * chunks + chunk) * groups * heads + own
        tl.store(sums + part * 2, tl.sum(dlog * steps, axis=0))
        tl.store(sums + part * 2 + 1, tl.sum(grad_dt, axis=0))
        if HAS_D:
            tl.store(dD + part * channels + p, tl.sum(g * v, axis=0), p < channels)
    sum_C += _dot(dpairs, b, NARROW, PRECISION, RAW)
    sum_B += _dot(tl.trans(dpairs), c, NARROW, PRECISION, RAW)
    image = (tl.program_id(1) * sequences + batch * groups) * length * d_state
    at = (pixel * groups + group)[:, None] * d_state + n[None, :]
    tl.store(dB + image + at, sum_B.to(dB.dtype.element_ty), wide)
    tl.store(dC + image + at, sum_C.to(dC.dtype.element_ty), wide)


@triton.jit
def add_routes(parts, total, count, columns, ROUTES: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK elements of (rows, columns), each the float32 sum of those of (rows, ROUTES, columns)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    at = place // columns * (columns * ROUTES) + place % columns
    value = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(ROUTES):
        value += tl.load(parts + at + k * columns, mask, 0.0).to(tl.float32)
    tl.store(total + place, value.to(total.dtype.element_ty), mask)
