"""Rows times a factor each in Triton. A program owns a row; it moves x once and y once."""

import torch
import triton
import triton.language as tl


@triton.jit
def _forward(x, factors, y, columns, TILE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    value = tl.load(x + row * columns + column, column < columns)
    tl.store(y + row * columns + column, value * tl.load(factors + row), column < columns)


@triton.jit
def _backward(dy, x, factors, dx, dfactors, columns, TILE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    inside = column < columns
    grad = tl.load(dy + row * columns + column, inside, 0.0)
    tl.store(dx + row * columns + column, grad * tl.load(factors + row), inside)
    tl.store(dfactors + row, tl.sum(grad * tl.load(x + row * columns + column, inside, 0.0)))


def scale_rows(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Arguments as in :func:`mmvmamba.ops.scale_rows`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _forward[(len(x),)](x, factors.contiguous(), y, x.shape[1], TILE=triton.next_power_of_2(x.shape[1]))
    return y


def scale_rows_backward(dy: torch.Tensor, x: torch.Tensor, factors: torch.Tensor) -> tuple:
    """Gradients of x and of the factors."""
    dy, x, factors = dy.contiguous(), x.contiguous(), factors.contiguous()
    dx, dfactors = torch.empty_like(x), torch.empty_like(factors)
    tile = triton.next_power_of_2(x.shape[1])
    _backward[(len(x),)](dy, x, factors, dx, dfactors, x.shape[1], TILE=tile)
    return dx, dfactors
