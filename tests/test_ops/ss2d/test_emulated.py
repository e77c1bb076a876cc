"""The CUDA kernels for N = 2 to 16 on an emulated GPU, against float64: indices, tails, chains, order of threads."""

import shutil
import sys

import pytest
import torch

from mmvmamba.ops import ss2d_scan
from tests.test_ops.ss2d.test_numerics import ss2d_inputs
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


@pytest.mark.parametrize('bias', [-1e3, 1e3])
@pytest.mark.parametrize('A_log', [-70.0, 80.0])
def test_any_step_and_decay(bias, A_log):
    """What a state keeps of the step before is multiplied by A, 5e34 here: 0 must be 0 and no rounding error."""
    from tests.test_ops.ss2d.emulation import Core

    arguments, y = ss2d_inputs('cpu', torch.float32, 1.0, bias, A_log, states=3)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y)
    x, *parameters = arguments.values()
    expected = run(
        lambda *values: ss2d_scan(*values, backend='naive'), x.double(), [p.double() for p in parameters], dy
    )
    core = Core(x, *parameters, 'cross2d', chain=2)
    for name, value, reference in zip(NAMES, [core.forward(), *core.backward(dy)], expected):
        assert relative_error(value, reference) < 1e-4, name


@pytest.mark.parametrize('which', range(6), ids=('x', 'x_proj', 'dt_projs', 'dt_bias', 'A_logs', 'Ds'))
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_nan_and_infinity_take_the_routes_and_no_others(which, value):
    from tests.test_ops.ss2d.emulation import Core

    arguments = [make_map(2, 5, 3, 5), *make_parameters(5, 2, 3)]
    arguments[which] = arguments[which].contiguous()
    arguments[which].view(-1)[7] = value
    y, expected = Core(*arguments, 'cross2d').forward(), ss2d_scan(*arguments, backend='naive')
    finite = expected.isfinite()
    assert torch.equal(y.isfinite(), finite)
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-4, atol=1e-5)


def test_no_order_of_threads_changes_a_bit():
    from tests.test_ops.ss2d.emulation import Core

    x, dy, parameters = make_map(1, 40, 5, 6), make_map(1, 40, 5, 6, seed=2), make_parameters(40, 3, 4)
    cores = [Core(x, *parameters, 'cross2d', chain=2, block_groups=2, seed=seed) for seed in (1, 2)]
    first, second = ([core.forward(), *core.backward(dy)] for core in cores)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
