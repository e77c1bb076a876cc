"""The fused SS2D core in Triton, for GPUs where the C++ kernels are not built.

Forward: prepare parameters; one GEMM for the projections (dt, B, C) of all routes; a batched GEMM for u = Wdt dt; then
for each pair of routes the block carries and their combination, if an image has more than one block, and the scan.
Backward: the same projections and u, the scans' adjoint a pair, then the projections' gradients by GEMMs.  Every sum
has a fixed order.  Here for N = 1; several states a channel have kernels of their own, in ``triton_states.py``.
"""

import torch
import triton

from . import triton_states
from .tiling import power_of_two
from .triton_backward import backward, backward_carries
from .triton_forward import forward, forward_carries
from .triton_problem import (
    LN2,
    LOG2E,
    Problem,
    by_route,
    device_of,
    flatten_map,
    in_order,
    tall_product,
    unflatten_map,
)


def ss2d_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, out_dtype, training):
    """Forward; arguments as in :func:`mmvmamba.ops.ss2d_scan`, parameters float32 and contiguous.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Merged map, projections (pixels, 4 * columns), and if ``training`` the states
        (batch, segments, 4, channels) entering each segment, flattened; for N > 1 those entering each block.
    """
    with device_of(x):
        problem = Problem(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode)
        if problem.d_state > 1:
            y, *saved = triton_states.forward(problem, out_dtype, training)
            return unflatten_map(y, x), *saved
        projections = x.new_empty((problem.pixels, 4 * problem.columns))
        torch.mm(problem.image, problem.weight.t(), out=projections)
        u = problem.project_u(projections)
        y = x.new_empty((problem.pixels, problem.channels), dtype=out_dtype)
        states = x.new_empty((problem.saved if training else 0,), dtype=torch.float32)
        tensors = (problem.image, u, projections, problem.floats)
        for pair in range(2):
            entering = problem.entering(forward_carries, tensors, pair, False, problem.second_reversed)
            problem.launch(
                forward,
                (*tensors, entering, y, states),
                pair,
                problem.tiling.forward_registers,
                CHAINED=entering is not None,
                SAVE=training,
            )
    return unflatten_map(y, x), projections, states


def ss2d_scan_backward(
    dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, projections, states, scan_mode
):  # fmt: skip
    """Gradients of :func:`ss2d_scan` for x and the five parameters."""
    with device_of(x):
        problem = Problem(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode)
        if states.numel() != problem.saved:
            raise ValueError('ss2d_scan_backward: the forward was run without saving its states')
        if problem.d_state > 1:
            dx, *others = triton_states.backward(problem, flatten_map(dy.to(x.dtype)), projections, states)
            return unflatten_map(dx, x), *others
        pixels, channels, columns, rank = problem.pixels, problem.channels, problem.columns, problem.dt_rank
        dy = flatten_map(dy.to(x.dtype))
        u = problem.project_u(projections)
        dx = torch.empty_like(problem.image)
        parts = states.new_empty((problem.groups, pixels, 4, 2))
        partial = states.new_empty((problem.batch * problem.chain, 9, problem.groups * problem.tile[-1]))
        for pair in range(2):
            entering = problem.entering(
                backward_carries, (dy, u, projections, problem.floats), pair, True, not problem.second_reversed
            )
            problem.launch(
                backward,
                (problem.image, dy, u, projections, problem.floats, states, entering, dx, parts, partial, pixels),
                pair,
                problem.tiling.backward_registers,
                CHAINED=entering is not None,
                TP=power_of_two(problem.tiling.segment),
            )

        # u now holds du2. Its product with the dt projection has zeros in the columns of B and C.
        dprojections = torch.empty_like(projections)
        torch.bmm(u.transpose(0, 1), problem.dt_matrix.transpose(1, 2), out=by_route(dprojections, columns))
        dprojections.view(pixels, 4, columns)[:, :, -2:] = parts.sum(0)
        ddt = tall_product(projections, u.view(pixels, 4 * channels), min(8, triton.cdiv(pixels, 256)))
        dweight = tall_product(dprojections, problem.image, min(128, triton.cdiv(pixels, 256)))
        dx.addmm_(dprojections, problem.weight)

        sums = partial.sum(0)[:, :channels]
        dweight = in_order(dweight.view(4, columns, channels))
        ddt = ddt.view(4, columns, 4, channels).diagonal(dim1=0, dim2=2)[:rank]  # (rank, channels, 4)
        return (
            unflatten_map(dx, x),
            torch.cat((dweight[:, :rank], LN2 * dweight[:, -2:-1], dweight[:, -1:]), dim=1),
            in_order(ddt.permute(2, 1, 0)) * LOG2E,
            in_order(sums[4:8]) * LOG2E,
            in_order(sums[:4] * problem.floats[4:8]).reshape(-1, 1) * LN2,
            sums[8].repeat(4),
        )
