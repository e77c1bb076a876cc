"""The fused SS2D core in Triton for several states a channel, on the host: as ``triton.py``, some images at a time.

What the scans leave between kernels grows with N times the pixels, so it is held for a piece of the images alone.
Saved are the states that enter the blocks of chains; an image of one block needs none.
"""

import torch
import triton

from .tiling import ceil_div
from .triton_problem import LN2, LOG2E, by_route, in_order, tall_product
from .triton_states_backward import leave_carries_back, scan_back
from .triton_states_forward import leave_carries, scan

PIECE = 2**23  # pixels times channels of the images that are taken at a time: 64 MiB of u in float16


def forward(problem, out_dtype, training):
    """Outputs (pixels, channels), projections, and if ``training`` the states entering the blocks, flattened."""
    states = problem.floats.new_empty(problem.saved if training else 0)
    y = torch.empty_like(problem.image, dtype=out_dtype)
    projections = problem.image.new_empty((problem.pixels, 4 * problem.columns))
    torch.mm(problem.image, problem.weight.t(), out=projections)
    for piece, images, pixels in _pieces(problem):
        tensors = (piece.image, piece.project_u(projections[pixels]), projections[pixels], piece.floats)
        for pair in range(2):
            entering = piece.entering(
                leave_carries, tensors, pair, False, piece.second_reversed, _saved(piece, states, pair, images),
                d_state=piece.d_state,
            )  # fmt: skip
            piece.launch(
                scan, (*tensors, entering, y[pixels]), pair, piece.tiling.forward_registers,
                d_state=piece.d_state, CHAINED=entering is not None,
            )  # fmt: skip
    return y, projections, states


def backward(problem, dy, projections, states):
    """Gradients of x, flattened, and of the five parameters."""
    dx = torch.empty_like(problem.image)
    sums: tuple = ()
    for piece, images, pixels in _pieces(problem):
        saved = [_saved(piece, states, pair, images) for pair in range(2)]
        own = _piece_backward(piece, dy[pixels], projections[pixels], saved, dx[pixels])
        sums = tuple(a + b for a, b in zip(sums, own)) if sums else own

    partial, dweight, ddt = sums
    channels, d_state, rank = problem.channels, problem.d_state, problem.dt_rank
    dweight = in_order(dweight.view(4, problem.columns, channels))
    ddt = ddt.view(4, problem.dt_columns, 4, channels).diagonal(dim1=0, dim2=2)[:rank]  # (rank, channels, 4)
    dB, dC = (dweight[:, first::2] for first in (-2 * d_state, 1 - 2 * d_state))
    dA_logs = in_order((partial[4:-1] * problem.floats[4:-1]).view(4, d_state, channels))
    return (
        dx,
        torch.cat((dweight[:, :rank], LN2 * dB, dC), dim=1),
        in_order(ddt.permute(2, 1, 0)) * LOG2E,
        in_order(partial[:4]) * LOG2E,
        dA_logs.transpose(1, 2).reshape(-1, d_state) * LN2,
        partial[-1].repeat(4),
    )


def _piece_backward(piece, dy, projections, saved, dx):
    """Fill ``dx``; returns the sums over the piece's pixels that become the gradients of the parameters."""
    pixels, channels, columns, d_state = piece.pixels, piece.channels, piece.columns, piece.d_state
    u = piece.project_u(projections)
    parts = piece.floats.new_empty((piece.groups, pixels, 2, 2 * d_state))
    partial = piece.floats.new_empty((piece.batch * piece.chain, 5 + 4 * d_state, piece.groups * piece.tile[-1]))
    dprojections = torch.zeros_like(projections)
    for pair in range(2):
        flows = piece.entering(
            leave_carries_back, (dy, u, projections, piece.floats), pair, True, not piece.second_reversed,
            d_state=d_state,
        )  # fmt: skip
        piece.launch(
            scan_back,
            (piece.image, dy, u, projections, piece.floats, saved[pair], flows, dx, parts, partial, pixels),
            pair, piece.tiling.backward_registers, d_state=d_state, CHAINED=flows is not None,
        )  # fmt: skip
        dprojections.view(pixels, 4, columns)[:, 2 * pair : 2 * pair + 2, -2 * d_state :] = parts.sum(0)

    # u now holds du2
    to_dt = by_route(dprojections, columns)[..., : piece.dt_columns]
    torch.bmm(u.transpose(0, 1), piece.dt_matrix.transpose(1, 2), out=to_dt)
    dt = projections.view(pixels, 4, columns)[..., : piece.dt_columns].reshape(pixels, 4 * piece.dt_columns)
    ddt = tall_product(dt, u.view(pixels, 4 * channels), min(8, triton.cdiv(pixels, 256)))
    dweight = tall_product(dprojections, piece.image, min(128, triton.cdiv(pixels, 256)))
    dx.addmm_(dprojections, piece.weight)
    return partial.sum(0)[:, :channels], dweight, ddt


def _pieces(problem):
    """Runs of about as many images each: a problem of them, the slices of images and of pixels."""
    most = max(1, PIECE // (problem.length * problem.channels))
    step = ceil_div(problem.batch, ceil_div(problem.batch, most))
    for first in range(0, problem.batch, step):
        last = min(first + step, problem.batch)
        pixels = slice(first * problem.length, last * problem.length)
        yield problem.of_images(first, last), slice(first, last), pixels


def _saved(problem, states, pair, images):
    """Where the states entering the blocks of a pair and of some images are saved; None if none are."""
    row = problem.chain * 2 * problem.d_state * problem.channels
    return states.view(2, -1, row)[pair, images] if states.numel() else None
