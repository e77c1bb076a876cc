"""The CUDA kernels for N = 2 to 16 on an emulated GPU, against float64: indices, tails, chains, order of threads."""

import shutil
import sys

import pytest

from mmvmamba.ops import ss2d_scan
from tests.test_ops.ss2d_inputs import make_map, make_parameters, relative_error, run

pytestmark = pytest.mark.skipif(
    shutil.which('c++') is None or sys.platform != 'linux', reason='needs a C++ compiler and ucontext'
)
NAMES = ('y', 'dx', 'dx_proj_weight', 'ddt_projs_weight', 'ddt_projs_bias', 'dA_logs', 'dDs')
# batch, channels, height, width, rank, N, mode; blocks of an image, groups of a block, dt projected by a GEMM
CASES = [
    ((1, 24, 3, 4, 9, 16, 'cross2d'), 1, 1, False),
    ((2, 33, 7, 5, 6, 2, 'cross2d'), 1, 2, False),
    ((1, 32, 5, 10, 3, 4, 'unidi'), 1, 1, True),
    ((1, 40, 7, 11, 9, 8, 'bidi'), 2, 1, False),
    ((2, 7, 9, 17, 1, 16, 'cross2d'), 3, 1, True),
    ((1, 70, 4, 13, 5, 11, 'cross2d'), 1, 2, False),  # N padded, a block with a group that does not exist
    ((1, 8, 1, 1, 1, 3, 'bidi'), 1, 1, False),
    ((1, 8, 1, 31, 2, 5, 'unidi'), 2, 1, False),
    ((1, 3, 25, 1, 2, 2, 'cross2d'), 2, 1, True),
]


@pytest.mark.parametrize('case, chain, block_groups, project', CASES, ids=str)
def test_output_and_every_gradient(case, chain, block_groups, project):
    from tests.test_ops.ss2d.emulation import Core

    *shape, rank, d_state, mode = case
    x, dy, parameters = make_map(*shape), make_map(*shape, seed=2), make_parameters(shape[1], rank, d_state)
    expected = run(
        lambda *values: ss2d_scan(*values, mode, backend='naive'),
        x.double(),
        [value.double() for value in parameters],
        dy.double(),
    )
    core = Core(x, *parameters, mode, chain, block_groups, project, seed=len(str(case)))
    for name, value, reference in zip(NAMES, [core.forward(), *core.backward(dy)], expected):
        assert relative_error(value, reference) < 1e-5, name
