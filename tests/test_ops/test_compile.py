"""torch.library on CPU: opcheck, compile, export and autocast of the registered ops."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mmvmamba.ops import backend_report, cross_merge, cross_scan, selective_scan
from tests.test_ops.scan_inputs import make_scan_inputs, relative_error, run_scan, run_truth

OPS = torch.ops.mmvmamba
COMPILED = {status.name: status for status in backend_report()}['cpu']
pytestmark = pytest.mark.skipif(not COMPILED.available, reason=f'no compiled CPU backend: {COMPILED.reason}')


@pytest.mark.parametrize('optional', [True, False], ids=['full', 'bare'])
@pytest.mark.parametrize('dtype, d_state', [(torch.float64, 2), (torch.float32, 1), (torch.bfloat16, 1)], ids=str)
def test_opcheck_selective_scan(dtype, d_state, optional):
    inputs = make_scan_inputs(batch=1, d_state=d_state, length=70, dtype=dtype, optional=optional)
    values = [None if value is None else value.requires_grad_() for value in inputs.values()]
    float_output = dtype == torch.float32
    torch.library.opcheck(OPS.selective_scan.default, (*values, True, float_output))
    out, states = OPS.selective_scan(*values, True, float_output)
    values = [None if value is None else value.detach() for value in values]
    torch.library.opcheck(OPS.selective_scan_backward.default, (out.detach(), *values, states, True))


@pytest.mark.parametrize('channel_last', [False, True], ids=['first', 'last'])
def test_opcheck_cross_scan(channel_last):
    x = torch.randn(1, 3, 4, 5, requires_grad=True)
    torch.library.opcheck(OPS.cross_scan.default, (x, 0, channel_last))
    shape = (1, 20, 4, 3) if channel_last else (1, 4, 3, 20)
    y = torch.randn(shape, requires_grad=True)
    torch.library.opcheck(OPS.cross_merge.default, (y, 4, 5, 2, channel_last))


def core(x, A, D, bias):
    """A miniature of SS2D's core: everything that a model traces through the ops."""
    height, width = x.shape[2:]
    xs = cross_scan(x)
    B, C = xs[:, :, :1].tanh(), xs[:, :, 1:2].sigmoid()
    ys = selective_scan(xs.flatten(1, 2), xs.sin().flatten(1, 2), A, B, C, D, bias, True, out_dtype=torch.float32)
    return cross_merge(ys.unflatten(1, (4, -1)), (height, width)).cos()


def core_inputs(height, width, channels=3, batch=2):
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(batch, channels, height, width, generator=generator, requires_grad=True)
    A = -torch.rand(4 * channels, 1, generator=generator)
    D, bias = (torch.randn(4 * channels, generator=generator) for _ in range(2))
    return [x, *(value.requires_grad_() for value in (A, D, bias))]


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compile(backend):
    """One graph, forward and backward, for static sizes first and any size afterwards."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(core, fullgraph=True, backend=counter)
    for height, width in [(6, 5), (7, 9), (12, 4), (3, 14)]:
        inputs = core_inputs(height, width)
        out, expected = compiled(*inputs), core(*inputs)
        torch.testing.assert_close(out, expected)
        grads, expected = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected))
        for grad, value in zip(grads, expected):
            torch.testing.assert_close(grad, value, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2  # the second size makes height and width symbols


def test_compile_with_marked_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(core, fullgraph=True, backend=counter, dynamic=True)
    for height, width, batch in [(6, 5, 2), (7, 9, 3), (12, 4, 5)]:
        inputs = core_inputs(height, width, batch=batch)
        torch.testing.assert_close(compiled(*inputs), core(*inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize('d_state', [1, 4])
def test_compile_with_any_state_size(d_state):
    torch._dynamo.reset()
    inputs = make_scan_inputs(d_state=d_state, length=30)
    compiled = torch.compile(selective_scan, fullgraph=True, backend='aot_eager', dynamic=True)
    torch.testing.assert_close(compiled(**inputs), selective_scan(**inputs))


def test_export():
    class Core(torch.nn.Module):
        def forward(self, x, A, D, bias):
            return core(x, A, D, bias)

    dims = {0: torch.export.Dim('batch', max=64), 2: torch.export.Dim('height', max=256), 3: torch.export.Dim('width')}
    program = torch.export.export(Core(), tuple(core_inputs(6, 5)), dynamic_shapes=(dims, None, None, None))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {f'mmvmamba.{op}.default' for op in ('selective_scan', 'cross_scan', 'cross_merge')} <= targets
    for size in [(6, 5), (11, 8)]:
        inputs = core_inputs(*size, batch=3)
        torch.testing.assert_close(program.module()(*inputs), core(*inputs))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_promotes_the_inputs(dtype):
    """u and B in half, delta and C in float: the scan runs on their common dtype, the weights stay float32."""
    inputs = make_scan_inputs(d_state=2, length=40)
    half = {**inputs, 'u': inputs['u'].to(dtype), 'B': inputs['B'].to(dtype)}
    with pytest.raises(TypeError, match='outside autocast'):
        selective_scan(**half)
    dout = torch.randn_like(inputs['u'])
    with torch.autocast('cpu', dtype):
        result = run_scan(half, dout)
        direct, _ = OPS.selective_scan(*half.values(), True, True)
    truth = run_truth(half, dout)
    assert result['out'].dtype == torch.float32 and torch.equal(direct, result['out'])
    assert result['du'].dtype == dtype and result['ddelta'].dtype == torch.float32
    for name, value in truth.items():
        assert relative_error(result[name], value) < (2**-8 if name in ('du', 'dB') else 5e-5), name


def test_autocast_casts_half_weights_up():
    inputs = make_scan_inputs(length=10, dtype=torch.bfloat16)
    weights = {name: value.bfloat16() if name in ('A', 'D', 'delta_bias') else value for name, value in inputs.items()}
    with torch.autocast('cpu', torch.bfloat16):
        out = selective_scan(**weights)
    assert torch.equal(out, selective_scan(**{**weights, **{n: weights[n].float() for n in ('A', 'D', 'delta_bias')}}))


def test_compile_under_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(core, fullgraph=True, backend='aot_eager')
    inputs = core_inputs(5, 6)
    with torch.autocast('cpu', torch.bfloat16):
        out, expected = compiled(*inputs), core(*inputs)
    torch.testing.assert_close(out, expected)
    for grad, value in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (out, expected))):
        torch.testing.assert_close(grad, value, rtol=1e-4, atol=1e-5)
