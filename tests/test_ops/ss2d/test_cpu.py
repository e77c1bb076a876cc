"""The fused core on a CPU against its composition in float64, and what it is as an op."""

import logging
from contextlib import contextmanager

import pytest
import torch

from mmvmamba.ops import backend_report, ss2d_scan
from mmvmamba.ops.ss2d import interface
from tests.test_ops.ss2d_inputs import make_map, make_parameters, relative_error, run

CPU = next(status for status in backend_report() if status.name == 'cpu')
pytestmark = pytest.mark.skipif(not CPU.available, reason=CPU.reason)

NAMES = ('y', 'dx', 'dx_proj_weight', 'ddt_projs_weight', 'ddt_projs_bias', 'dA_logs', 'dDs')
# batch, channels, height, width, rank, states: tiles are 32 pixels of up to 64 channels, in vectors of 8
CASES = [
    (2, 96, 14, 14, 6, 1),
    (1, 64, 28, 28, 12, 1),
    (2, 200, 7, 7, 24, 1),
    (1, 136, 5, 9, 48, 1),
    (1, 1, 1, 1, 1, 1),
    (1, 32, 1, 1, 2, 2),
    (1, 7, 1, 37, 1, 1),
    (3, 9, 53, 1, 3, 2),
    (1, 33, 8, 4, 3, 1),
    (2, 65, 3, 11, 6, 2),
    (1, 72, 11, 13, 17, 1),
    (1, 24, 6, 7, 5, 16),
    (33, 8, 2, 3, 1, 1),
]


def fused(mode='cross2d', **options):
    return lambda *values: ss2d_scan(*values, mode, backend='cpu', **options)


def truth(x, parameters, dy, mode='cross2d'):
    """Output and gradients of the unfused ops in float64."""
    return run(fused(mode), x.double(), [value.double() for value in parameters], dy.double())


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_close(results, expected, limit=5e-5):
    for name, value, reference in zip(NAMES, results, expected):
        assert relative_error(value, reference) < (limit / 10 if name == 'y' else limit), name


@pytest.mark.parametrize('mode', ['cross2d', 'unidi', 'bidi'])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_output_and_every_gradient(case, mode):
    *shape, dt_rank, d_state = case
    x, dy = make_map(*shape), make_map(*shape, seed=2)
    parameters = make_parameters(shape[1], dt_rank, d_state)
    results = run(fused(mode), x, parameters, dy)
    assert_close(results, truth(x, parameters, dy, mode))
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    for count in (1, 2, 3):
        with threads(count):
            assert all(map(torch.equal, run(fused(mode), x, parameters, dy), results))
            with torch.no_grad():
                assert torch.equal(fused(mode)(x, *parameters), results[0])
            with torch.inference_mode():
                assert torch.equal(fused(mode)(x, *parameters), results[0])


def test_strides_do_not_matter():
    shape = (2, 40, 9, 11)
    x, dy, parameters = make_map(*shape), make_map(*shape, seed=2), make_parameters(40, 4)
    expected = run(fused(), x, parameters, dy)
    wide = torch.zeros(2, 9, 2 * 11, 80)
    wide[:, :, ::2, 3:43] = x.permute(0, 2, 3, 1)
    for other in (x.contiguous(), wide[:, :, ::2, 3:43].permute(0, 3, 1, 2), x.transpose(2, 3).clone().transpose(2, 3)):
        turned = [value.flip(0).clone().flip(0) for value in parameters[:3]] + parameters[3:]
        assert all(map(torch.equal, run(fused(), other, turned, dy.contiguous()), expected))
    row = dy[:1, :1].expand(shape)
    assert_close(run(fused(), x, parameters, row), truth(x, parameters, row))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    x, dy = make_map(2, 40, 6, 7, dtype), make_map(2, 40, 6, 7, dtype, seed=2)
    parameters = make_parameters(40, 4)
    rounded = [value.to(dtype) for value in parameters[:2]] + parameters[2:]
    expected = truth(x, rounded, dy)
    results = run(fused(), x, parameters, dy)
    assert results[0].dtype == results[1].dtype == dtype and results[2].dtype == torch.float32
    half_way = torch.finfo(dtype).eps / 2
    for index, (value, reference) in enumerate(zip(results, expected)):
        assert relative_error(value, reference) < (half_way if index < 2 else 5e-5), NAMES[index]
    y = fused(out_dtype=torch.float32)(x, *parameters)
    assert y.dtype == torch.float32 and relative_error(y, expected[0]) < 5e-6
    low = [value.to(dtype) for value in parameters]
    assert [value.dtype for value in run(fused(), x, low, dy)] == [dtype] * 7


def test_autocast():
    x, dy, parameters = make_map(1, 32, 6, 6), make_map(1, 32, 6, 6, seed=2), make_parameters(32, 2)
    with torch.autocast('cpu', torch.bfloat16):
        results = run(fused(), x, parameters, dy)
    assert results[0].dtype == torch.bfloat16 and {value.dtype for value in results[1:]} == {torch.float32}
    expected = truth(x, parameters, dy)
    assert all(relative_error(value, reference) < 2e-2 for value, reference in zip(results, expected))


def test_gradients_of_some_arguments():
    x, dy, parameters = make_map(1, 16, 4, 5), make_map(1, 16, 4, 5, seed=2), make_parameters(16, 2)
    expected = run(fused(), x, parameters, dy)
    for index in range(6):
        values = [x, *parameters]
        values[index] = values[index].clone().requires_grad_()
        fused()(*values).backward(dy)
        assert torch.equal(values[index].grad, expected[1 + index])


@pytest.mark.parametrize('offset, scale', [(-60, 1), (60, 1), (0, 40)], ids=['steps of 0', 'large steps', 'far A'])
def test_far_from_usual_values(offset, scale):
    x, dy, parameters = make_map(1, 16, 5, 8), make_map(1, 16, 5, 8, seed=2), make_parameters(16, 2)
    parameters[2] += offset
    parameters[3] *= scale
    results, expected = run(fused(), x, parameters, dy), truth(x, parameters, dy)
    for value, reference in zip(results, expected):
        assert value.isfinite().all() and relative_error(value, reference) < 1e-4


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_stays_on_its_routes(value):
    x, parameters = make_map(2, 9, 4, 5), make_parameters(9, 2)
    x[0, 3, 2, 2] = value
    finite = ss2d_scan(x, *parameters, 'unidi', backend='naive').isfinite()
    assert torch.equal(fused('unidi')(x, *parameters).isfinite(), finite) and finite[1].all() and not finite.all()


def test_float64_is_composed_and_said_once(caplog, monkeypatch):
    monkeypatch.setattr(interface, '_announced', set())
    x, parameters = make_map(1, 8, 5, 5, torch.float64), make_parameters(8, 2, dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger='mmvmamba.ops'):
        y = fused()(x, *parameters)
        fused()(x, *parameters)
    assert sum('composed' in record.message for record in caplog.records) == 1
    assert relative_error(y, ss2d_scan(x, *parameters, backend='naive')) < 1e-12


def test_composition_can_be_asked_for():
    x, dy, parameters = make_map(1, 24, 6, 6), make_map(1, 24, 6, 6, seed=2), make_parameters(24, 2)
    expected = run(fused(), x, parameters, dy)
    with interface.use_composed():
        results = run(fused(), x, parameters, dy)
    assert not torch.equal(results[2], expected[2])  # other roundings: it is another path
    assert_close(results, expected)


def test_second_derivatives_are_refused():
    x, parameters = make_map(1, 8, 3, 3).requires_grad_(), make_parameters(8, 2)
    (gradient,) = torch.autograd.grad(fused()(x, *parameters).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='ss2d_scan: second derivatives'):
        gradient.sum().backward()


@pytest.mark.parametrize('d_state', [1, 2])
def test_is_a_well_behaved_op(d_state):
    x = make_map(2, 20, 5, 7).requires_grad_()
    parameters = [value.requires_grad_() for value in make_parameters(20, 2, d_state)]
    for training in (True, False):
        leaves = [value.detach().requires_grad_(training) for value in (x, *parameters)]
        torch.library.opcheck(torch.ops.mmvmamba.ss2d_scan.default, (*leaves, 0, True, training))


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_into_one_graph(dynamic):
    parameters = make_parameters(32, 2)

    def function(x, *parameters):
        return torch.relu(ss2d_scan(torch.sin(x), *parameters, backend='cpu'))

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for size in ((6, 7), (9, 5)):
        x, dy = make_map(2, 32, *size), make_map(2, 32, *size, seed=2)
        for value, expected in zip(run(compiled, x, parameters, dy), run(function, x, parameters, dy)):
            assert relative_error(value, expected) < 1e-5


def test_exports_as_one_node():
    class Core(torch.nn.Module):
        def forward(self, x, *parameters):
            return ss2d_scan(x, *parameters, backend='cpu')

    height, width = torch.export.Dim('height', min=2), torch.export.Dim('width', min=2)
    parameters = make_parameters(16, 2)
    shapes = dict(x={2: height, 3: width}, parameters=tuple({} for _ in parameters))
    with torch.no_grad():
        program = torch.export.export(Core(), (make_map(1, 16, 6, 7), *parameters), dynamic_shapes=shapes)
    assert str(program.graph).count('mmvmamba.ss2d_scan.default') == 1
    x = make_map(1, 16, 9, 5)
    with torch.no_grad():
        assert torch.equal(program.module()(x, *parameters), fused()(x, *parameters))
