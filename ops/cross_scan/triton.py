"""Cross-scan and cross-merge in Triton.

A program moves one tile of a plane (channel-first) or of pixels (channel-last).  Row and column routes of a tile are
stored with their own pointers; the compiler turns the tile between them.  Moves x once and y once.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from .routes import ROUTES

# of each mode; bit k: route k runs along columns, or in reverse
_COLUMN, _REVERSE = (
    tuple(sum(route[i] << k for k, route in enumerate(routes)) for routes in ROUTES.values()) for i in range(2)
)
TILE = 64
MAX_PIXELS = (2**31 - 1) // 2  # of a map: the kernels' steps have 32 bits; kMaxPixels of csrc/cross_scan/cuda.cpp
MAX_SIDE = 65535 * TILE  # of a map, channel-first: a tile is a block of the grid's second and third dimension


@triton.jit
def _step(row, column, height, width, COLUMN: tl.constexpr, REVERSE: tl.constexpr):
    """The step at which a route passes a pixel."""
    step = column * height + row if COLUMN else row * width + column
    return height * width - 1 - step if REVERSE else step


@triton.jit
def _first(x, y, channels, height, width, COLUMN: tl.constexpr, REVERSE: tl.constexpr, MERGE: tl.constexpr,
           TILE_H: tl.constexpr, TILE_W: tl.constexpr):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)[:, None]
    column = tl.program_id(2) * TILE_W + tl.arange(0, TILE_W)[None, :]
    mask = (row < height) & (column < width)
    length = height * width
    pixel = x + plane * length + row * width + column
    route = plane // channels * 4 * channels + plane % channels
    if MERGE:
        total = tl.zeros([TILE_H, TILE_W], tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    else:
        value = tl.load(pixel, mask)
    for k in tl.static_range(4):
        at = y + (route + k * channels) * length
        at += _step(row, column, height, width, (COLUMN >> k) & 1 != 0, (REVERSE >> k) & 1 != 0)
        if MERGE:
            total += tl.load(at, mask, 0.0).to(total.dtype)
        else:
            tl.store(at, value, mask)
    if MERGE:
        tl.store(pixel, total.to(x.dtype.element_ty), mask)


@triton.jit
def _last(x, y, pixels, channels, height, width, COLUMN: tl.constexpr, REVERSE: tl.constexpr, MERGE: tl.constexpr,
          TILE_P: tl.constexpr, TILE_C: tl.constexpr):  # fmt: skip
    pixel = (tl.program_id(0).to(tl.int64) * TILE_P + tl.arange(0, TILE_P))[:, None]
    channel = (tl.program_id(1) * TILE_C + tl.arange(0, TILE_C))[None, :]
    mask = (pixel < pixels) & (channel < channels)
    length = height * width
    own = (pixel % length).to(tl.int32)  # of its image
    row, column = own // width, own % width
    at_pixel = x + pixel * channels + channel
    if MERGE:
        total = tl.zeros([TILE_P, TILE_C], tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    else:
        value = tl.load(at_pixel, mask)
    for k in tl.static_range(4):
        step = _step(row, column, height, width, (COLUMN >> k) & 1 != 0, (REVERSE >> k) & 1 != 0)
        at = y + ((pixel - own + step) * 4 + k) * channels + channel
        if MERGE:
            total += tl.load(at, mask, 0.0).to(total.dtype)
        else:
            tl.store(at, value, mask)
    if MERGE:
        tl.store(at_pixel, total.to(x.dtype.element_ty), mask)


def _launch(x, y, height, width, scan_mode, channel_last, merge):
    channels = x.shape[3 if channel_last else 1]
    options = dict(COLUMN=_COLUMN[scan_mode], REVERSE=_REVERSE[scan_mode], MERGE=merge, num_warps=4)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if channel_last:
            pixels = x.shape[0] * height * width
            tile_c = min(128, triton.next_power_of_2(channels))
            tile_p = 2048 // tile_c
            grid = (triton.cdiv(pixels, tile_p), triton.cdiv(channels, tile_c))
            _last[grid](x, y, pixels, channels, height, width, TILE_P=tile_p, TILE_C=tile_c, **options)
        else:
            tile_h, tile_w = (min(TILE, triton.next_power_of_2(n)) for n in (height, width))
            grid = (x.shape[0] * channels, triton.cdiv(height, tile_h), triton.cdiv(width, tile_w))
            _first[grid](x, y, channels, height, width, TILE_H=tile_h, TILE_W=tile_w, **options)


def _check_mode(op: str, scan_mode: int) -> None:
    if not 0 <= scan_mode < len(ROUTES):
        raise ValueError(f'{op}: scan_mode is {scan_mode}, expected 0 to {len(ROUTES) - 1}')


def _check_size(op: str, name: str, height: int, width: int, channel_last: bool) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(
            f'{op}: {name} has a map of {height} x {width} pixels, at most {MAX_PIXELS} are supported on a GPU'
        )
    if not channel_last and max(height, width) > MAX_SIDE:
        raise ValueError(
            f'{op}: {name} has a map of {height} x {width} pixels, at most {MAX_SIDE} a side are supported by triton'
        )


def cross_scan(x, scan_mode: int, channel_last: bool) -> torch.Tensor:
    """Unfold a map along four routes; arguments as in :func:`mmvmamba.ops.cross_scan`, the mode by its index."""
    height, width = x.shape[1:3] if channel_last else x.shape[2:4]
    _check_mode('cross_scan', scan_mode)
    _check_size('cross_scan', 'x', height, width, channel_last)
    x = x.contiguous()
    channels = x.shape[3 if channel_last else 1]
    shape = (height * width, 4, channels) if channel_last else (4, channels, height * width)
    y = x.new_empty((x.shape[0], *shape))
    _launch(x, y, height, width, scan_mode, channel_last, merge=False)
    return y


def cross_merge(y, height: int, width: int, scan_mode: int, channel_last: bool) -> torch.Tensor:
    """Fold four routes back and add them in float32; the adjoint of :func:`cross_scan`."""
    _check_mode('cross_merge', scan_mode)
    _check_size('cross_merge', 'y', height, width, channel_last)
    channels = y.shape[3 if channel_last else 2]
    expected = (height * width, 4, channels) if channel_last else (4, channels, height * width)
    if y.shape[1:] != expected:
        raise ValueError(f'cross_merge: y has shape {tuple(y.shape)}, expected {(y.shape[0], *expected)}')
    y = y.contiguous()
    shape = (height, width, channels) if channel_last else (channels, height, width)
    x = y.new_empty((y.shape[0], *shape))
    _launch(x, y, height, width, scan_mode, channel_last, merge=True)
    return x
