"""What the fused SS2D core in Triton shares on the host: sizes, parameters, launches."""

import copy
from contextlib import nullcontext

import torch
import triton

from ..cross_scan.routes import ROUTES
from .registration import map_columns, map_dt_columns, saved_by_triton
from .tiling import power_of_two, tiling_of
from .triton_kernels import combine, prepare

COMBINED = 64  # blocks of a chain that are combined at a time
LN2, LOG2E = 0.6931471805599453, 1.4426950408889634


class Problem:
    """What the two directions share: sizes, the map as (pixels, channels), prepared parameters."""

    def __init__(self, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan_mode):
        if scan_mode == 'cascade2d':
            raise ValueError(f'ss2d_scan: the fused kernels take no cascade, got {scan_mode}')
        self.batch, self.channels, self.height, self.width = x.shape
        self.length = self.height * self.width
        self.pixels = self.batch * self.length
        self.dt_rank, self.d_state = dt_projs_weight.shape[2], A_logs.shape[1]
        self.columns = map_columns(self.dt_rank, self.d_state)
        self.dt_columns = map_dt_columns(self.dt_rank, self.d_state)
        if 4 * self.length * max(self.channels, self.columns) >= 2**31:
            raise ValueError(f'ss2d_scan: an image of x {tuple(x.shape)} is too large for the fused triton kernels')
        self.tiling = tiling_of(self.d_state)
        self.saved = saved_by_triton(self.batch, self.length, self.channels, self.d_state)
        self.segments, self.chain = self.tiling.segments(self.length), self.tiling.chain(self.length)
        self.tile = self.tiling.tile(self.length, self.channels)
        self.groups = triton.cdiv(self.channels, self.tile[-1])
        (_, _), (by_column, _), (_, self.second_reversed), _ = ROUTES[scan_mode]
        self.column_second = by_column and min(self.height, self.width) > 1  # else both orders are one
        self.image = flatten_map(x)

        self.weight = x.new_empty((4 * self.columns, self.channels))
        self.dt_matrix = x.new_empty((4, self.dt_columns, self.channels))
        self.floats = x.new_empty((5 + 4 * self.d_state, self.channels), dtype=torch.float32)
        prepare[(4 * self.columns, triton.cdiv(self.channels, 256))](
            x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, self.weight, self.dt_matrix, self.floats,
            self.channels, self.dt_rank, self.dt_columns, self.columns, self.d_state, BLOCK=256,
        )  # fmt: skip

    def of_images(self, first, last):
        """The same problem for some of the images."""
        part = copy.copy(self)
        part.batch = last - first
        part.pixels = part.batch * self.length
        part.image = self.image[first * self.length : last * self.length]
        return part

    def project_u(self, projections):
        """u2 without bias of all routes, (pixels, 4, channels)."""
        u = self.image.new_empty((self.pixels, 4, self.channels))
        dt = by_route(projections, self.columns)[..., : self.dt_columns]
        torch.bmm(dt, self.dt_matrix, out=u.transpose(0, 1))
        return u

    def launch(self, kernel, tensors, pair, registers, tile=None, **options):
        """Run a kernel on every block and group of channels; ``tile`` if its programs are not those of the scan."""
        segments, steps, width = tile or self.tile
        warps, groups = self.tiling.warps(segments, width), triton.cdiv(self.channels, width)
        kernel[(self.batch * self.chain * groups,)](
            *tensors, groups, self.chain, self.segments, self.length, self.height, self.width, self.channels,
            self.columns, PAIR=pair, COLUMN=pair == 1 and self.column_second, SECOND_REVERSED=self.second_reversed,
            HALF=self.image.dtype != torch.float32, T=steps, S=segments, C=width, num_warps=warps,
            maxnreg=min(registers, 128 if warps > 4 else 255), **options,
        )  # fmt: skip

    def entering(self, kernel, tensors, pair, first_reversed, second_reversed, entering=None, **options):
        """States entering the blocks of a chain, in the order of each route; None if a block is all of an image.

        Args:
            kernel (Callable): Leaves products and ends of the blocks, (batch, chain, 2, N, channels).
            tensors (tuple): Its first arguments.
            pair (int): Pair of routes.
            first_reversed (bool): Whether the first route's state goes from the image's last block to its first.
            second_reversed (bool): Whether the second one's does.
            entering (Tensor, optional): Memory for the result. Default: None, its own.
            options (int): Last arguments of the kernel.
        """
        if self.chain == 1:
            return None
        size = self.batch * self.chain * 2 * self.d_state * self.channels
        products, ends = self.floats.new_empty((2, size))
        entering = torch.empty_like(ends) if entering is None else entering
        tile = self.tiling.carry_tile(self.length, self.channels)
        self.launch(kernel, (*tensors, products, ends), pair, self.tiling.backward_registers, tile, **options)
        groups = triton.cdiv(self.channels, 32)
        combine[(2 * self.d_state * self.batch * groups,)](
            products, ends, entering, groups, self.chain, self.channels, self.d_state, FIRST_REVERSED=first_reversed,
            SECOND_REVERSED=second_reversed, K=min(COMBINED, power_of_two(self.chain)), C=32, num_warps=4,
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


def in_order(values):
    """Swap the order of pairs, (0, 2 | 1, 3), and that of routes along the first dimension."""
    return values.reshape(2, 2, *values.shape[1:]).transpose(0, 1).reshape(values.shape)


def device_of(tensor: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
