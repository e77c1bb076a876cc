"""The CUDA kernels for several states a channel on an emulated GPU: their own source, compiled for the host.

What ``csrc/ss2d/states/cuda.cu`` does with torch is done here likewise: memory, GEMMs, the order of the kernels.
"""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from mmvmamba.ops.cross_scan.routes import ROUTES

HERE = Path(__file__).resolve().parent / 'emulated'
CSRC = Path(__file__).resolve().parents[3] / 'ops/csrc'
FORWARD, CARRIES, COMBINE, BACKWARD, BACKWARD_CARRIES, COMBINE_BACK, ADD_PARTS = range(7)


@functools.cache
def library():
    """The compiled kernels."""
    folder = tempfile.mkdtemp()
    target = f'{folder}/kernels.so'
    command = ['c++', '-O1', '-std=c++17', '-w', '-shared', '-fPIC', f'-I{HERE}', f'-I{CSRC}']
    subprocess.run([*command, str(HERE / 'kernels.cpp'), '-o', target], check=True)
    loaded = ctypes.CDLL(target)
    loaded.size_of.restype = ctypes.c_int64
    return loaded


def size_of(which, *numbers):
    """A size of ``layout.h``: 0 columns, 1, 2 bytes of a block forward and backward, 3 its groups, 4 the segment."""
    return library().size_of(which, *numbers, *[0] * (4 - len(numbers)))


def pointers(tensors):
    """Their addresses, as C takes them."""
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def numbers_of(values):
    """Integers, as C takes them."""
    return (ctypes.c_int64 * len(values))(*map(int, values))


def power_of_two(n):
    return max(2, 1 << (n - 1).bit_length())


class Core:
    """The fused core on a float map; ``chain`` and ``block_groups`` are what the GPU's size decides there.

    Memory starts as NaN, so that nothing is read before it is written.
    """

    def __init__(self, x, x_proj, dt_proj, dt_bias, A_logs, Ds, mode, chain=1, block_groups=1, project=True, seed=0):
        self.batch, self.channels, self.height, self.width = x.shape
        self.length, self.rank, self.d_state = self.height * self.width, dt_proj.shape[2], A_logs.shape[1]
        self.states, self.seed, self.image = power_of_two(self.d_state), seed, x.permute(0, 2, 3, 1).contiguous()
        self.padded = -(-self.channels // 32) * 32
        self.groups, self.segments = self.padded // 32, -(-self.length // size_of(4))
        self.chunk = -(-self.segments // chain)
        self.chain = -(-self.segments // self.chunk)
        self.splits, self.block_groups = -(-self.groups // block_groups), block_groups
        self.dt_columns, self.columns = -(-self.rank // 8) * 8, size_of(0, self.rank, self.d_state)
        (_, _), (by_column, _), (_, self.reversed), _ = ROUTES[mode]
        self.by_column = by_column and min(self.height, self.width) > 1

        self.weight, self.dt_matrix = (
            self.new(4, self.columns, self.channels),
            self.new(4, self.dt_columns, self.channels),
        )
        self.dt_weight, self.bias = self.new(4, self.dt_columns, self.padded), self.new(4, self.padded)
        self.A, self.skip = self.new(4, self.states, self.padded), self.new(self.padded)
        made = (self.weight, self.dt_matrix, self.dt_weight, self.bias, self.A, self.skip)
        sizes = (self.channels, self.padded, self.rank, self.dt_columns, self.columns, self.d_state, self.states)
        parameters = [t.contiguous() for t in (x_proj, dt_proj, dt_bias, A_logs, Ds)]
        library().run_prepare(pointers([*parameters, *made]), numbers_of(sizes))
        rows = self.image.view(-1, self.channels)
        self.projections = rows @ self.weight.view(-1, self.channels).T
        self.u = None
        if project:
            dt = self.projections.view(-1, 4, self.columns)[..., : self.dt_columns]
            self.u = torch.einsum('pqr,qrc->pqc', dt, self.dt_matrix).contiguous()
        self.saved = self.new(self.batch, self.segments, 4, self.groups, self.states * 32)

    @staticmethod
    def new(*shape):
        return torch.full(shape, float('nan'))

    def run(self, kernel, pair, **tensors):
        """Launch a scan kernel for a pair."""
        own = dict(x=self.image, projections=self.projections, u=self.u, dt_weight=self.dt_weight, bias=self.bias)
        own.update(A=self.A, skip=self.skip, states=self.saved, **tensors)
        order = ['x', 'dy', 'projections', 'u', 'dt_weight', 'bias', 'A', 'skip', 'y', 'states', 'carries', 'sums']
        order += ['du', 'dprojections', 'parts', 'partial']
        sizes = [self.batch, self.channels, self.padded, self.groups, self.height, self.width, self.length]
        sizes += [self.segments, self.rank, self.dt_columns, self.columns, self.chain, self.chunk, self.splits]
        sizes += [self.block_groups, pair, self.by_column and pair == 1, self.reversed]
        library().run_scan(
            self.states, kernel, pointers([own.get(name) for name in order]), numbers_of(sizes), self.seed
        )

    def enter(self, kernels, pair, **tensors):
        """What the blocks of a chain pass on."""
        if self.chain == 1:
            return {}
        carries = self.new(self.batch, self.chain, 2, self.groups, self.states * 32)
        memory = dict(carries=carries, sums=self.new(self.batch, self.chain, 2, self.padded))
        for kernel in kernels:
            self.run(kernel, pair, **memory, **tensors)
        return memory

    def forward(self):
        """The merged map."""
        y = torch.full_like(self.image, float('nan'))
        for pair in range(2):
            self.run(FORWARD, pair, y=y, **self.enter((CARRIES, COMBINE), pair))
        return y.permute(0, 3, 1, 2)

    def backward(self, dy):
        """Gradients of x and the five parameters."""
        dy = dy.permute(0, 2, 3, 1).contiguous()
        pixels, rows, N = self.batch * self.length, self.batch * self.chain, self.states
        dx, du = torch.full_like(self.image, float('nan')), self.new(pixels, 4, self.channels)
        dprojections = self.new(pixels, 4, self.columns)
        parts = self.new(self.splits, pixels, 4, 2 * N) if self.splits > 1 else None
        partial = self.new(2, rows, 2, N + 2, self.padded)
        for pair in range(2):
            memory = self.enter((BACKWARD_CARRIES, COMBINE_BACK), pair, dy=dy)
            own = dict(dy=dy, du=du, dprojections=dprojections, parts=parts, partial=partial[pair])
            self.run(BACKWARD, pair, y=dx, **own, **memory)
        if parts is not None:
            self.run(ADD_PARTS, 0, parts=parts, dprojections=dprojections)
        dprojections[..., : self.dt_columns] = torch.einsum('pqc,qrc->pqr', du, self.dt_matrix)
        dt = self.projections.view(pixels, 4, self.columns)[..., : self.dt_columns]
        ddt = torch.einsum('pqr,pqc->qrc', dt, du).contiguous()
        flat = dprojections.view(pixels, -1)
        dweight = flat.T @ self.image.view(pixels, -1)
        dx = dx.view(pixels, -1) + flat @ self.weight.view(-1, self.channels)

        shapes = ((4, self.rank + 2 * self.d_state, self.channels), (4, self.channels, self.rank), (4, self.channels))
        gradients = [self.new(*shape) for shape in (*shapes, (4 * self.channels, self.d_state), (4 * self.channels,))]
        sizes = [rows, 1, 1, self.channels, self.padded, self.rank, self.dt_columns, self.columns, self.d_state, N]
        library().run_finish(pointers([partial, dweight, ddt, self.A, *gradients]), numbers_of(sizes))
        return [dx.view(self.image.shape).permute(0, 3, 1, 2), *gradients]
