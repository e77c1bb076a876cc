"""Cross-scan and cross-merge on CPU: the published index maps, the adjoint identity, both layouts."""

import importlib.util

import pytest
import torch

from mmvmamba.ops import SCAN_MODES, backend_report, cross_merge, cross_scan, selective_scan
from tests.test_ops.scan_inputs import make_scan_inputs

COMPILED = {status.name: status for status in backend_report()}['cpu']
BACKENDS = [
    'naive',
    pytest.param(
        'cpu', marks=pytest.mark.skipif(not COMPILED.available, reason=f'no compiled CPU backend: {COMPILED.reason}')
    ),
]
SIZES = [(1, 1), (1, 5), (6, 1), (7, 4), (14, 10)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def ids(value):
    return str(value).replace('torch.', '').replace(', ', 'x').strip('()')


def routes_of(size, scan_mode, channel_last, backend):
    """(4, L): the pixel that each route reads at each step."""
    pixels = torch.arange(size[0] * size[1], dtype=torch.float64).view(1, 1, *size)
    if channel_last:
        return cross_scan(pixels.permute(0, 2, 3, 1), scan_mode, True, backend)[0, :, :, 0].T.long()
    return cross_scan(pixels, scan_mode, backend=backend)[0, :, 0].long()


@pytest.mark.parametrize('channel_last', [False, True], ids=['first', 'last'])
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (14, 10)], ids=ids)
@pytest.mark.parametrize('scan_mode', ['cross2d', 'unidi', 'bidi'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_published_index_maps(backend, scan_mode, size, channel_last, op_reference):
    prefix = f'csm/{scan_mode}/{size[0]}x{size[1]}'
    routes = routes_of(size, scan_mode, channel_last, backend)
    assert torch.equal(routes, torch.from_numpy(op_reference[f'{prefix}/src']).long())
    # merging reads the inverse map: a route that holds its own step numbers gives them back at their pixels
    inverse = torch.from_numpy(op_reference[f'{prefix}/inv']).long()
    for route in range(4):
        steps = torch.zeros(1, 4, 1, size[0] * size[1], dtype=torch.float64)
        steps[0, route, 0] = torch.arange(size[0] * size[1])
        steps = steps.permute(0, 3, 1, 2) if channel_last else steps
        merged = cross_merge(steps, size, scan_mode, channel_last, backend).flatten()
        assert torch.equal(merged.long(), inverse[route])


@pytest.mark.parametrize('backend', BACKENDS)
def test_cascade_index_map(backend):
    routes = routes_of((2, 3), 'cascade2d', False, backend)
    assert routes.tolist() == [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]]


@pytest.mark.parametrize('channel_last', [False, True], ids=['first', 'last'])
@pytest.mark.parametrize('size', SIZES, ids=ids)
@pytest.mark.parametrize('scan_mode', SCAN_MODES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_adjoint(backend, scan_mode, size, channel_last):
    """<scan x, y> = <x, merge y>, and each is the other's gradient."""
    height, width = size
    shapes = [(2, 3, height, width), (2, 4, 3, height * width)]
    if channel_last:
        shapes = [(2, height, width, 3), (2, height * width, 4, 3)]
    x, y = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    scanned, merged = (
        cross_scan(x, scan_mode, channel_last, backend),
        cross_merge(y, size, scan_mode, channel_last, backend),
    )
    assert scanned.shape == y.shape and merged.shape == x.shape
    assert scanned.is_contiguous() and merged.is_contiguous()
    torch.testing.assert_close((scanned * y).sum(), (x * merged).sum())
    (dx,) = torch.autograd.grad(scanned, x, y)
    (dy,) = torch.autograd.grad(merged, y, x)
    torch.testing.assert_close(dx, merged)
    assert torch.equal(dy, scanned)


@pytest.mark.skipif(not COMPILED.available, reason=f'no compiled CPU backend: {COMPILED.reason}')
@pytest.mark.parametrize('channel_last', [False, True], ids=['first', 'last'])
@pytest.mark.parametrize('dtype', DTYPES, ids=ids)
@pytest.mark.parametrize('scan_mode', SCAN_MODES)
def test_compiled_against_naive(scan_mode, dtype, channel_last):
    x = torch.randn(2, 5, 9, 6).to(dtype)
    y = torch.randn(2, 9 * 6, 4, 5).to(dtype)
    if not channel_last:  # views with strides
        x, y = x.transpose(1, 3).contiguous().transpose(1, 3), y.permute(0, 2, 3, 1)
        size = (9, 6)
    else:
        size = (5, 9)
        y = torch.randn(2, 4, 6, 45).to(dtype).permute(0, 3, 1, 2)
    assert not y.is_contiguous()
    for function, arguments in ((cross_scan, (x,)), (cross_merge, (y, size))):
        naive, compiled = (function(*arguments, scan_mode, channel_last, name) for name in ('naive', 'cpu'))
        assert torch.equal(naive, compiled) and naive.dtype == compiled.dtype == dtype


@pytest.mark.parametrize('backend', BACKENDS)
def test_half_precision_is_added_in_float(backend):
    """1 + 2^-11 + 2^-11 + 0 rounds up in float16 only if the small terms meet before rounding."""
    y = torch.tensor([1.0, 2**-11, 2**-11, 0.0], dtype=torch.float16).view(1, 4, 1, 1)
    assert cross_merge(y, (1, 1), backend=backend).item() == 1 + 2**-10


@pytest.mark.parametrize('backend', BACKENDS)
def test_identity_scan_between_scan_and_merge(backend):
    """With A so negative that nothing is carried over, B = C = 1 and delta = 1, SS2D's core returns 4 x."""
    x = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    xs = cross_scan(x, backend=backend).flatten(1, 2)
    inputs = make_scan_inputs(batch=1, groups=4, channels=2, length=15, dtype=torch.float64, optional=False)
    ones = torch.ones_like(inputs['B'])
    ys = selective_scan(xs, torch.ones_like(xs), torch.full_like(inputs['A'], -800.0), ones, ones, backend=backend)
    torch.testing.assert_close(cross_merge(ys.unflatten(1, (4, 2)), (3, 5), backend=backend), 4 * x)


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')
@pytest.mark.parametrize('channel_last', [False, True], ids=['first', 'last'])
@pytest.mark.parametrize(
    'size, layouts', [((70000, 70000), (False, True)), ((2**15, 2**15), (False, True)), ((1, 2**22), (False,))], ids=str
)
def test_maps_that_triton_can_not_index_are_refused_before_anything_runs(size, layouts, channel_last):
    """The product of the first pair's numbers is positive in 32 bits."""
    from mmvmamba.ops.cross_scan import triton

    x, y = torch.empty(1, 1, *size, device='meta'), torch.empty(1, 4, 1, size[0] * size[1], device='meta')
    if channel_last:
        x, y = x.permute(0, 2, 3, 1), y.permute(0, 3, 1, 2)
    if channel_last not in layouts:
        triton._check_size('cross_scan', 'x', *size, channel_last)
        return
    message = rf'has a map of {size[0]} x {size[1]} pixels, at most \d+ .*supported'
    with pytest.raises(ValueError, match=f'cross_scan: x {message}'):
        triton.cross_scan(x, 0, channel_last)
    with pytest.raises(ValueError, match=f'cross_merge: y {message}'):
        triton.cross_merge(y, *size, 0, channel_last)
