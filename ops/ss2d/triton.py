"""The fused SS2D core in Triton, N = 1, for GPUs where the C++ kernels are not built.

Forward: prepare parameters; one GEMM for the projections (dt, B, C) of all routes; a batched GEMM for u = Wdt dt; then
for each pair of routes the block carries and their combination, if an image has more than one block, and the scan.
Backward: the same projections and u, the scans' adjoint a pair, then the projections' gradients by GEMMs.  Every sum
has a fixed order.
"""

from contextlib import nullcontext

import torch
import triton

from ..cross_scan.routes import ROUTES
from .registration import TRITON_SEGMENT, map_columns
from .triton_backward import backward, backward_carries
from .triton_forward import forward, forward_carries
from .triton_kernels import combine, prepare

TILE = 256  # segments times channels of a block, if that leaves at least NARROWEST channels
NARROWEST = 16  # channels: 32 bytes of float16, what memory moves at a time
PER_THREAD = 2  # channels of a segment that a thread has: more need fewer shuffles, fewer need fewer registers
BLOCK_SEGMENTS, LONE_SEGMENTS = 8, 32  # segments of a block in a chain, and most segments of an image of one block
FORWARD_REGISTERS, BACKWARD_REGISTERS = 128, 168  # of a thread: 16 and 12 warps fit a processor
COMBINED = 64  # blocks of a chain that are combined at a time
LN2, LOG2E = 0.6931471805599453, 1.4426950408889634


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile(segments: int, channels: int) -> tuple:
    """Segments and channels of a block, and blocks of an image.

    At least 32 elements, so that no two threads hold the same one: backward replaces u in place.
    """
    lone = segments <= LONE_SEGMENTS
    block = max(2, _power_of_two(segments)) if lone else BLOCK_SEGMENTS
    width = max(32 // block, min(max(TILE // block, NARROWEST), _power_of_two(channels)), 1)
    while width > max(32 // block, 32) and channels % width:
        width //= 2
    return block, width, 1 if lone else triton.cdiv(segments, block)


class _Problem:
    """What the two directions share: sizes, the map as (pixels, channels), prepared parameters."""

    def __init__(self, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode):
        if A_logs.shape[1] != 1 or scan_mode == 'cascade2d':
            raise ValueError(
                f'ss2d_scan: the fused kernels take d_state 1 and no cascade, got {A_logs.shape}, {scan_mode}'
            )
        self.batch, self.channels, self.height, self.width = x.shape
        self.length = self.height * self.width
        self.pixels = self.batch * self.length
        self.dt_rank, self.columns = dt_projs_weight.shape[2], map_columns(dt_projs_weight.shape[2])
        if 4 * self.length * max(self.channels, self.columns) >= 2**31:
            raise ValueError(f'ss2d_scan: an image of x {tuple(x.shape)} is too large for the fused triton kernels')
        self.segments = triton.cdiv(self.length, TRITON_SEGMENT)
        self.block, self.tile, self.chain = _tile(self.segments, self.channels)
        self.groups = triton.cdiv(self.channels, self.tile)
        (_, _), (by_column, _), (_, self.second_reversed), _ = ROUTES[scan_mode]
        self.column_second = by_column and min(self.height, self.width) > 1  # else both orders are one
        self.image = flatten_map(x)

        matrices = x.new_empty((2, 4, self.columns, self.channels))
        self.floats = x.new_empty((9, self.channels), dtype=torch.float32)
        self.weight, self.dt_matrix = matrices[0].view(-1, self.channels), matrices[1]
        prepare[(4 * self.columns, triton.cdiv(self.channels, 256))](
            x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, self.weight, self.dt_matrix, self.floats,
            self.channels, self.dt_rank, self.columns, BLOCK=256,
        )  # fmt: skip
        if self.chain > 1:
            self.carries = x.new_empty((3, self.batch * self.chain * 2 * self.channels), dtype=torch.float32)

    def project_u(self, projections):
        """u2 without bias of all routes, (pixels, 4, channels)."""
        u = self.image.new_empty((self.pixels, 4, self.channels))
        torch.bmm(by_route(projections, self.columns), self.dt_matrix, out=u.transpose(0, 1))
        return u

    def launch(self, kernel, tensors, pair, registers, **options):
        """Run a scan kernel on every block and group of channels."""
        warps = max(1, self.block * self.tile // (32 * PER_THREAD))
        kernel[(self.batch * self.chain * self.groups,)](
            *tensors, self.groups, self.chain, self.segments, self.length, self.height, self.width, self.channels,
            self.columns, PAIR=pair, COLUMN=pair == 1 and self.column_second, SECOND_REVERSED=self.second_reversed,
            HALF=self.image.dtype != torch.float32, T=TRITON_SEGMENT, S=self.block, C=self.tile,
            num_warps=warps,
            maxnreg=min(registers, 128 if warps > 4 else 255), **options,
        )  # fmt: skip

    def entering(self, kernel, tensors, pair, first_reversed, second_reversed):
        """States entering the blocks of a chain, in the order of each route; None if a block is all of an image."""
        if self.chain == 1:
            return None
        products, ends, entering = self.carries
        self.launch(kernel, (*tensors, products, ends), pair, FORWARD_REGISTERS)
        groups = triton.cdiv(self.channels, 32)
        combine[(2 * self.batch * groups,)](
            products, ends, entering, groups, self.chain, self.channels, FIRST_REVERSED=first_reversed,
            SECOND_REVERSED=second_reversed, K=min(COMBINED, _power_of_two(self.chain)), C=32, num_warps=4,
        )  # fmt: skip
        return entering


def flatten_map(x):
    """(B, D, H, W) as (pixels, channels), a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1])


def unflatten_map(y, x):
    """Pixels back to a map of the shape of ``x``."""
    batch, channels, height, width = x.shape
    return y.view(batch, height, width, channels).permute(0, 3, 1, 2)


def by_route(projections, columns):
    """(pixels, 4 * columns) as (4, pixels, columns)."""
    return projections.view(-1, 4, columns).transpose(0, 1)


def tall_product(a, b, chunks: int):
    """a^T b in float32 for many rows: chunks of rows as a batch, then their sum, so that the GEMM fills the GPU."""
    rows = a.shape[0]
    length = rows // chunks
    whole = length * chunks
    left = a[:whole].view(chunks, length, -1).transpose(1, 2)
    products = a.new_empty((chunks, a.shape[1], b.shape[1]))
    total = torch.bmm(left, b[:whole].view(chunks, length, -1), out=products).sum(0, dtype=torch.float32)
    if whole < rows:
        total += torch.mm(a[whole:].t(), b[whole:], out=a.new_empty((a.shape[1], b.shape[1])))
    return total


def ss2d_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode, out_dtype, training):
    """Forward; arguments as in :func:`mmvmamba.ops.ss2d_scan`, parameters float32 and contiguous.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Merged map, projections (pixels, 4 * columns), and if ``training`` the states
        (batch, segments, 4, channels) entering each segment, flattened.
    """
    with device_of(x):
        problem = _Problem(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode)
        projections = x.new_empty((problem.pixels, 4 * problem.columns))
        torch.mm(problem.image, problem.weight.t(), out=projections)
        u = problem.project_u(projections)
        y = x.new_empty((problem.pixels, problem.channels), dtype=out_dtype)
        size = problem.batch * problem.segments * 4 * problem.channels if training else 0
        states = x.new_empty((size,), dtype=torch.float32)
        tensors = (problem.image, u, projections, problem.floats)
        for pair in range(2):
            entering = problem.entering(forward_carries, tensors, pair, False, problem.second_reversed)
            problem.launch(
                forward,
                (*tensors, entering, y, states),
                pair,
                FORWARD_REGISTERS,
                CHAINED=entering is not None,
                SAVE=training,
            )
    return unflatten_map(y, x), projections, states


def ss2d_scan_backward(
    dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, projections, states, scan_mode
):  # fmt: skip
    """Gradients of :func:`ss2d_scan` for x and the five parameters."""
    with device_of(x):
        problem = _Problem(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode)
        pixels, channels, columns, rank = problem.pixels, problem.channels, problem.columns, problem.dt_rank
        if states.numel() != problem.batch * problem.segments * 4 * channels:
            raise ValueError('ss2d_scan_backward: the forward was run without saving its states')
        dy = flatten_map(dy.to(x.dtype))
        u = problem.project_u(projections)
        dx = torch.empty_like(problem.image)
        parts = states.new_empty((problem.groups, pixels, 4, 2))
        partial = states.new_empty((problem.batch * problem.chain, 9, problem.groups * problem.tile))
        for pair in range(2):
            entering = problem.entering(
                backward_carries, (dy, u, projections, problem.floats), pair, True, not problem.second_reversed
            )
            problem.launch(
                backward,
                (problem.image, dy, u, projections, problem.floats, states, entering, dx, parts, partial, pixels),
                pair,
                BACKWARD_REGISTERS,
                CHAINED=entering is not None,
                TP=_power_of_two(TRITON_SEGMENT),
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


def in_order(values):
    """Swap the order of pairs, (0, 2 | 1, 3), and that of routes along the first dimension."""
    return values.reshape(2, 2, *values.shape[1:]).transpose(0, 1).reshape(values.shape)


def device_of(tensor: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
