"""ss2d_scan on CPU: backends agree, gradients, dtypes, errors; and which maps the fused kernels are not given."""

import importlib.util
import logging

import pytest
import torch

from mmvmamba.ops import cross_merge, cross_scan, selective_scan, ss2d_scan, use_backend
from mmvmamba.ops.extension import load_extension
from mmvmamba.ops.ss2d import interface
from mmvmamba.ops.ss2d.registration import cuda_columns, map_columns
from tests.test_ops.ss2d_inputs import make_map, make_parameters, relative_error, run

needs_extension = pytest.mark.skipif(bool(load_extension()), reason=load_extension() or '-')
SIZES = [(1, 1), (1, 5), (6, 1), (4, 7)]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('scan_mode', ['cross2d', 'unidi', 'bidi'])
def test_is_the_composition_of_its_equations(scan_mode, size):
    x = make_map(2, 6, *size, dtype=torch.float64)
    weight, dt_weight, dt_bias, A_logs, Ds = make_parameters(6, 2, 3, torch.float64)
    xs = cross_scan(x, scan_mode)
    y = 0
    routes = []
    for k in range(4):
        projections = torch.einsum('rd,bdl->brl', weight[k], xs[:, k])
        dt, B, C = projections[:, :2], projections[:, 2:5], projections[:, 5:]
        delta = torch.einsum('dr,brl->bdl', dt_weight[k], dt)
        channels = slice(6 * k, 6 * k + 6)
        routes.append(
            selective_scan(
                xs[:, k],
                delta,
                -A_logs[channels].exp(),
                B[:, None],
                C[:, None],
                Ds[channels],
                dt_bias[k],
                delta_softplus=True,
                backend='naive',
            )
        )
    y = cross_merge(torch.stack(routes, dim=1), size, scan_mode)
    torch.testing.assert_close(ss2d_scan(x, weight, dt_weight, dt_bias, A_logs, Ds, scan_mode), y)


@pytest.mark.parametrize('d_state', [1, 2])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_cpu_backend_gives_the_naive_numbers(size, d_state):
    x, dy = make_map(2, 8, *size), make_map(2, 8, *size, seed=2)
    parameters = make_parameters(8, 3, d_state)
    expected = run(lambda *values: ss2d_scan(*values, backend='naive'), x, parameters, dy)
    for value, reference in zip(run(lambda *values: ss2d_scan(*values, backend='cpu'), x, parameters, dy), expected):
        assert relative_error(value, reference) < 1e-5


def test_gradients_are_those_of_finite_differences():
    values = [make_map(1, 3, 2, 3, dtype=torch.float64), *make_parameters(3, 2, 1, torch.float64)]
    values = [value.contiguous().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(lambda *args: ss2d_scan(*args, backend='naive'), values)


def test_output_dtype_and_autocast():
    x, parameters = make_map(1, 4, 3, 3), make_parameters(4, 2)
    assert ss2d_scan(x.bfloat16(), *parameters).dtype == torch.bfloat16
    assert ss2d_scan(x.bfloat16(), *parameters, out_dtype=torch.float32).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert ss2d_scan(x, *parameters).dtype == torch.bfloat16


def test_backend_of_the_block_is_used():
    x, parameters = make_map(1, 4, 3, 3), make_parameters(4, 2)
    with use_backend('naive'):
        expected = ss2d_scan(x, *parameters)
    torch.testing.assert_close(ss2d_scan(x, *parameters), expected, rtol=1e-5, atol=1e-5)


def test_meta_tensors_give_the_shape():
    x, parameters = make_map(2, 4, 3, 5, device='meta'), make_parameters(4, 2, device='meta')
    y = ss2d_scan(x, *parameters)
    assert y.is_meta and y.shape == x.shape and y.dtype == x.dtype


@pytest.mark.parametrize(
    'backend, channels, dt_rank, size, fits',
    [
        pytest.param('cuda', 8, 6, (4200, 4200), False, marks=needs_extension),  # as if it had 32 channels
        pytest.param('cuda', 32, 6, (4096, 4095), True, marks=needs_extension),
        pytest.param('cuda', 32, 6, (4096, 4096), False, marks=needs_extension),
        pytest.param('cuda', 33, 6, (4096, 2048), False, marks=needs_extension),
        pytest.param('cuda', 32, 48, (4096, 2047), True, marks=needs_extension),
        pytest.param('cuda', 32, 48, (4096, 2048), False, marks=needs_extension),  # projections of 64 columns
        ('triton', 8, 6, (4200, 4200), True),
        ('triton', 8, 6, (8192, 8191), True),
        ('triton', 8, 6, (8192, 8192), False),
        ('triton', 8, 14, (8192, 4096), False),  # projections of 16 columns
    ],
    ids=str,
)
def test_maps_too_large_for_the_fused_kernels_are_composed_and_said_once(
    backend, channels, dt_rank, size, fits, caplog, monkeypatch
):
    monkeypatch.setattr(interface, '_announced', set())
    monkeypatch.setattr(interface.registration, 'UNSUPPORTED', '')
    x = torch.empty(1, channels, *size, device='meta')
    with caplog.at_level(logging.INFO, logger='mmvmamba.ops'):
        assert [interface._fits(x, dt_rank, 1, backend) for _ in range(2)] == [fits] * 2
    assert sum('composed' in record.message for record in caplog.records) == (0 if fits else 1)
    if backend == 'triton' and not fits and importlib.util.find_spec('triton'):
        from mmvmamba.ops.ss2d.triton_problem import Problem

        with pytest.raises(ValueError, match='too large for the fused triton kernels'):
            Problem(x, *make_parameters(channels, dt_rank, device='meta'), 'cross2d')


@pytest.mark.parametrize('backend', [pytest.param('cuda', marks=needs_extension), 'triton'])
def test_states_that_the_kernels_of_a_gpu_take(backend, monkeypatch):
    monkeypatch.setattr(interface, '_announced', set())
    monkeypatch.setattr(interface.registration, 'UNSUPPORTED', '')
    x, most = torch.empty(1, 32, 4, 4, device='meta'), dict(cuda=16, triton=64)[backend]
    assert [interface._fits(x, 6, d_state, backend) for d_state in (1, 2, most, most + 1)] == [True, True, True, False]


@pytest.mark.parametrize('dt_rank, d_state, columns', [(6, 2, 16), (6, 16, 40), (9, 3, 24), (48, 64, 176)])
def test_columns_of_several_states_are_aligned(dt_rank, d_state, columns):
    assert map_columns(dt_rank, d_state) == columns >= dt_rank + 2 * d_state and columns % 8 == 0


@pytest.mark.parametrize('dt_rank, columns', [(1, 8), (6, 8), (7, 16), (12, 16), (13, 16), (24, 32), (48, 64)])
def test_columns_hold_dt_b_and_c(dt_rank, columns):
    assert map_columns(dt_rank) == columns >= dt_rank + 2
    if not load_extension():
        assert cuda_columns(dt_rank) == columns


@pytest.mark.parametrize(
    'position, value, error, words',
    [
        (0, torch.rand(2, 4, 3), ValueError, ('x', '(2, 4, 3)')),
        (0, torch.ones(1, 4, 3, 3, dtype=torch.long), TypeError, ('x', 'int64')),
        (0, torch.rand(1, 4, 0, 3), ValueError, ('x', 'empty')),
        (1, torch.rand(4, 5, 4), ValueError, ('x_proj_weight', '(4, 5, 4)', '(4, 4, 4)')),
        (2, torch.rand(4, 5, 2), ValueError, ('dt_projs_weight', '(4, 5, 2)', '(4, 4, 2)')),
        (3, torch.rand(3, 4), ValueError, ('dt_projs_bias', '(3, 4)', '(4, 4)')),
        (4, torch.rand(15, 1), ValueError, ('A_logs', '(15, 1)', '(16, 1)')),
        (5, torch.rand(15), ValueError, ('Ds', '(15,)', '(16,)')),
        (6, 'cascade2d', ValueError, ('cascade2d', 'cross2d')),
        (6, 'zigzag', ValueError, ('zigzag', 'cross2d')),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value)[:24],
)
def test_bad_arguments(position, value, error, words):
    arguments = [make_map(1, 4, 3, 3), *make_parameters(4, 2), 'cross2d']
    arguments[position] = value
    with pytest.raises(error) as raised:
        ss2d_scan(*arguments)
    assert all(word in str(raised.value) for word in words), raised.value
