"""The GPU backends against the naive one in float64; skipped without a GPU."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mmvmamba.ops import (
    BackendError,
    backend_report,
    cross_merge,
    cross_scan,
    selective_scan,
    ss2d_scan,
)
from tests.test_ops.scan_inputs import (
    ROUNDING,
    assert_scan_close,
    make_scan_inputs,
    relative_error,
    run_scan,
    run_truth,
)
from tests.test_ops.selective_scan.test_selective_scan import strided
from tests.test_ops.ss2d_inputs import make_map, make_parameters
from tests.test_ops.test_compile import core, core_inputs

STATUS = {status.name: status for status in backend_report()}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU is visible to torch')
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not STATUS[name].available, reason=f'{name}: {STATUS[name].reason}'))
    for name in ('cuda', 'triton')
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STATES = [1, 2, 8, 16, 64]
SIZES = [(n, length) for n in STATES for length in (1, 7, 49, 196, 1000, 2048, 2049, 4096)] + [(1, 67200), (16, 67200)]
LONG = [(n, 67200) for n in (2, 8, 64)]


def ids(value):
    return str(value).replace('torch.', '')


@functools.lru_cache(maxsize=2)
def case(d_state, length, dtype):
    """Inputs, output gradient and truth, shared by the backends of a case."""
    inputs = make_scan_inputs(batch=1, d_state=d_state, length=length, dtype=dtype, device='cuda')
    dout = torch.randn(inputs['u'].shape, device='cuda').to(dtype)
    device = 'cuda' if length > 5000 else 'cpu'  # a short loop is faster where a step costs no launch
    truth = run_truth({name: value.to(device) for name, value in inputs.items()}, dout.to(device))
    return inputs, dout, truth


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', DTYPES, ids=ids)
@pytest.mark.parametrize('d_state, length', [*SIZES, *(pytest.param(*size, marks=pytest.mark.slow) for size in LONG)])
def test_scan(d_state, length, dtype, backend):
    """Views at the odd lengths."""
    inputs, dout, truth = case(d_state, length, dtype)
    if length % 2:
        inputs, dout = {name: strided(value) for name, value in inputs.items()}, strided(dout)
    result = run_scan(inputs, dout, backend=backend)
    assert_scan_close({name: value.cpu() for name, value in result.items()}, truth, dtype)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('batch, groups, channels', [(1, 1, 1), (2, 4, 24), (1, 2, 37), (3, 3, 5), (40, 4, 96)])
@pytest.mark.parametrize('length', [49, 300])
@pytest.mark.parametrize('d_state', [1, 3])
def test_groups(d_state, length, batch, groups, channels, backend):
    inputs = make_scan_inputs(batch, groups, channels, d_state, length, device='cuda')
    dout = torch.randn_like(inputs['u'])
    assert_scan_close(run_scan(inputs, dout, backend=backend), run_truth(inputs, dout), torch.float32)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', DTYPES, ids=ids)
@pytest.mark.parametrize('d_state', [1, 4, 256])
def test_options(d_state, dtype, backend):
    """Float output, no softplus, no optional arguments, strides."""
    inputs = make_scan_inputs(d_state=d_state, length=260, dtype=dtype, device='cuda', optional=False)
    inputs['delta'] = inputs['delta'].abs()
    dout = torch.randn(inputs['u'].shape, device='cuda')
    truth = run_truth(inputs, dout, delta_softplus=False)
    views = {name: None if t is None else strided(t) for name, t in inputs.items()}
    result = run_scan(views, strided(dout), delta_softplus=False, out_dtype=torch.float32, backend=backend)
    assert result['out'].dtype == torch.float32
    assert_scan_close(result, truth, dtype)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('d_state', [1, 4])
def test_every_argument_may_be_strided(d_state, backend):
    inputs = make_scan_inputs(d_state=d_state, length=50, device='cuda')
    dout = torch.randn_like(inputs['u'])
    views = {name: strided(t) for name, t in inputs.items()}
    assert_scan_close(run_scan(views, strided(dout), backend=backend), run_truth(inputs, dout), torch.float32)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('length', [48, 49, 50, 52, 56, 255, 256, 257])
def test_unaligned_rows(length, backend):
    """Rows whose start is no multiple of 16 bytes, and a tensor that starts in the middle of one."""
    inputs = make_scan_inputs(length=length, dtype=torch.float16, device='cuda')
    dout = torch.randn_like(inputs['u'])
    shifted = torch.empty(inputs['u'].numel() + 1, dtype=torch.float16, device='cuda')[1:].view_as(inputs['u'])
    inputs['u'] = shifted.copy_(inputs['u'])
    assert_scan_close(run_scan(inputs, dout, backend=backend), run_truth(inputs, dout), torch.float16)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('d_state', [1, 16])
def test_same_bits_every_time(d_state, backend):
    """In the mode that users have: under deterministic algorithms torch fills what the ops allocate."""
    torch.use_deterministic_algorithms(False)
    inputs = make_scan_inputs(8, 4, 96, d_state, 784, torch.float16, 'cuda')
    dout = torch.randn_like(inputs['u'])
    first = run_scan(inputs, dout, backend=backend)
    for _ in range(3):
        second = run_scan(inputs, dout, backend=backend)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=ids)
def test_large_values_stay_finite(dtype, backend):
    inputs = make_scan_inputs(d_state=2, length=500, dtype=dtype, device='cuda')
    inputs['u'] = inputs['u'] * 1e3
    inputs['delta'] = (inputs['delta'] * 1e4).clamp(-50, 50)
    dout = torch.randn(inputs['u'].shape, device='cuda')
    result, truth = run_scan(inputs, dout, out_dtype=torch.float32, backend=backend), run_truth(inputs, dout)
    for name, expected in truth.items():
        largest = torch.finfo(result[name].dtype).max
        assert result[name][expected.abs() < 0.99 * largest].isfinite().all(), name
    assert result['out'].isfinite().all() and relative_error(result['out'], truth['out']) < 5e-6


@pytest.mark.parametrize('backend', BACKENDS)
def test_nan_is_passed_on(backend):
    inputs = make_scan_inputs(length=400, device='cuda')
    inputs['u'][0, 1, 7] = float('nan')
    out = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert out[0, 1, 7:].isnan().all() and out[0, 1, :7].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_opcheck(backend):
    names = ('selective_scan', 'cross_scan', 'cross_merge')
    ops = {name: getattr(torch.ops.mmvmamba, name + '_triton' * (backend == 'triton')).default for name in names}
    inputs = make_scan_inputs(batch=1, d_state=2, length=70, device='cuda')
    values = [value.requires_grad_() for value in inputs.values()]
    torch.library.opcheck(ops['selective_scan'], (*values, True, True))
    x = torch.randn(1, 3, 4, 5, device='cuda', requires_grad=True)
    torch.library.opcheck(ops['cross_scan'], (x, 0, False))
    y = torch.randn(1, 4, 3, 20, device='cuda', requires_grad=True)
    torch.library.opcheck(ops['cross_merge'], (y, 4, 5, 2, False))


def test_compile_with_dynamic_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('inductor')
    compiled = torch.compile(core, fullgraph=True, backend=counter)
    for size in [(6, 5), (7, 9), (30, 14), (56, 56)]:
        inputs = [value.detach().cuda().requires_grad_() for value in core_inputs(*size)]
        out, expected = compiled(*inputs), core(*inputs)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for grad, value in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected))):
            torch.testing.assert_close(grad, value, rtol=1e-3, atol=1e-3 * value.abs().max().item())
    assert counter.frame_count <= 2


def test_export():
    class Core(torch.nn.Module):
        def forward(self, x, A, D, bias):
            return core(x, A, D, bias)

    inputs = [value.detach().cuda() for value in core_inputs(6, 5)]
    dims = {2: torch.export.Dim('height', max=512), 3: torch.export.Dim('width', max=512)}
    program = torch.export.export(Core(), tuple(inputs), dynamic_shapes=(dims, None, None, None))
    inputs = [value.detach().cuda() for value in core_inputs(31, 18)]
    torch.testing.assert_close(program.module()(*inputs), core(*inputs))


def test_float64_goes_to_the_reference():
    """The kernels have no float64: auto takes naive for all of the core, and a kernel asked for by name says no."""
    x, parameters = make_map(1, 4, 5, 6, torch.float64, 'cuda'), make_parameters(4, 1, device='cuda')
    parameters = [value.double() for value in parameters]
    out = ss2d_scan(x, *parameters)
    expected = ss2d_scan(x.cpu(), *(value.cpu() for value in parameters))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(BackendError, match='float64'):
        ss2d_scan(x, *parameters, backend='cuda' if STATUS['cuda'].available else 'triton')


@pytest.mark.parametrize('backend', BACKENDS)
def test_cuda_graph(backend):
    """Forward and backward replayed from a graph, on new values."""
    inputs = make_scan_inputs(2, 4, 24, 1, 784, torch.float16, 'cuda')
    leaves = [value.requires_grad_() for value in inputs.values()]
    dout = torch.randn_like(inputs['u'])

    def step():
        out = selective_scan(*leaves, True, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for leaf in (*leaves, dout):
            leaf.mul_(1.1)
    graph.replay()
    for replayed, expected in zip(results, step()):
        assert torch.equal(replayed, expected)


@pytest.mark.parametrize('backend', BACKENDS)
def test_side_stream(backend):
    """The kernels run on the current stream: after work that is queued there, not beside it."""
    inputs = make_scan_inputs(4, 4, 24, 1, 784, device='cuda')
    expected = selective_scan(**inputs, delta_softplus=True, backend=backend)
    late, stream = torch.zeros_like(inputs['u']), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(inputs['u'])
        out = selective_scan(**{**inputs, 'u': late}, delta_softplus=True, backend=backend)
        x = cross_scan(late.unflatten(2, (28, 28)), backend=backend)
    stream.synchronize()
    assert torch.equal(out, expected)
    assert torch.equal(x, cross_scan(inputs['u'].unflatten(2, (28, 28)), backend='naive'))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
@pytest.mark.parametrize('backend', BACKENDS)
def test_device_that_is_not_current(backend):
    inputs = make_scan_inputs(length=100, device='cuda:1')
    dout = torch.randn_like(inputs['u'])
    assert torch.cuda.current_device() == 0
    assert_scan_close(run_scan(inputs, dout, backend=backend), run_truth(inputs, dout), torch.float32)


@pytest.mark.parametrize('backend', BACKENDS)
def test_autocast(backend):
    inputs = make_scan_inputs(d_state=2, length=100, device='cuda')
    mixed = {**inputs, 'u': inputs['u'].half(), 'B': inputs['B'].half()}
    with torch.autocast('cuda', torch.float16):
        out = selective_scan(**mixed, delta_softplus=True, backend=backend)
    assert out.dtype == torch.float32
    assert relative_error(out, run_truth(mixed)['out']) < 5e-6


def test_auto_and_float64():
    inputs = make_scan_inputs(length=30, device='cuda', dtype=torch.float64)
    truth = run_truth(inputs)['out']
    assert torch.equal(selective_scan(**inputs, delta_softplus=True), truth)  # the reference precision: naive
    with pytest.raises(BackendError, match=r'cuda.*float64'):
        selective_scan(**inputs, backend='cuda')


WRONG = {
    'mixed_devices': (lambda t: {**t, 'B': t['B'].cpu()}, r'B is on cpu, but u is on cuda:0'),
    'mixed_dtypes': (lambda t: {**t, 'delta': t['delta'].half()}, r'delta is float16, but u is float32'),
    'zero_batch': (lambda t: {**t, 'u': t['u'][:0]}, r'u has an empty dimension'),
    'integers': (lambda t: {**t, 'u': t['u'].long()}, r'u must be a floating-point tensor, got int64'),
    'many_states': (
        lambda t: {**t, 'A': t['A'].expand(-1, 257), **{n: t[n].expand(-1, -1, 257, -1) for n in 'BC'}},
        r'257 states \(N\), at most 256',
    ),
}


@pytest.mark.parametrize('name', WRONG)
def test_bad_input_leaves_the_process_usable(name):
    change, message = WRONG[name]
    inputs = make_scan_inputs(length=30, device='cuda')
    with pytest.raises((TypeError, ValueError), match=message):
        selective_scan(**change(inputs))
    torch.cuda.synchronize()
    assert selective_scan(**inputs).isfinite().all()
    with pytest.raises(RuntimeError, match=r'(?i)floating'):
        torch.ones(2, dtype=torch.int64, device='cuda').requires_grad_()


def _needs_memory(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 1e9 if torch.cuda.is_available() else 0
    return pytest.mark.skipif(free < gigabytes, reason=f'needs {gigabytes} GB of free GPU memory, {free:.0f} are free')


@_needs_memory(60)
@pytest.mark.parametrize('backend', BACKENDS)
def test_more_than_two_billion_elements(backend):
    """The last image of a batch beyond 2^31 elements gives what it gives alone."""
    batch, groups, channels, length = 700, 4, 256, 3001
    small = make_scan_inputs(1, groups, channels, 1, length, torch.float16, 'cuda')
    shared = ('u', 'delta', 'B', 'C')
    inputs = {name: t.expand(batch, *t.shape[1:]).contiguous() if name in shared else t for name, t in small.items()}
    assert inputs['u'].numel() > 2**31
    dout = torch.randn_like(small['u'])
    alone = run_scan(small, dout, backend=backend)
    everything = run_scan(inputs, dout.expand_as(inputs['u']).contiguous(), backend=backend)
    for image in (0, 699):
        for name in ('out', 'du', 'ddelta'):
            assert torch.equal(everything[name][image], alone[name][0]), name
        for name in ('dB', 'dC'):  # sums over channels, which a large batch divides differently
            assert relative_error(everything[name][image], alone[name][0]) < ROUNDING[torch.float16], name
    del everything, inputs
    x = torch.randn(1, 600, 1000, 1000, device='cuda', dtype=torch.float16)
    y = cross_scan(x, backend=backend)
    assert y.numel() > 2**31
    assert torch.equal(y[:, :, -1:], cross_scan(x[:, -1:].contiguous(), backend='naive'))
    merged = cross_merge(y, (1000, 1000), backend=backend)
    assert torch.equal(merged[:, -1], (4 * x[:, -1].float()).half())
