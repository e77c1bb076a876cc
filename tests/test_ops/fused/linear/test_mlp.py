"""mlp: linear, GELU, linear, in one op."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mmvmamba.ops import BackendError, backend_report, mlp, use_backend
from tests.test_ops.ss2d_inputs import relative_error, run

STATUS = {status.name: status for status in backend_report()}
CUDA, CPU = STATUS['cuda'], STATUS['cpu']
needs_gpu = pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
needs_cpu = pytest.mark.skipif(not CPU.available, reason=CPU.reason)
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [
    (1, 8, 16),
    (33, 40, 8),
    (1, 96, 384),
    (1001, 96, 384),
    (70000, 96, 128),
    (129, 128, 512),
    (4097, 192, 768),
    (20000, 24, 96),
    (65, 384, 1536),
]


def reference(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def make_inputs(rows, channels, hidden, device='cpu'):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,), (rows, channels))
    x, weight1, bias1, weight2, bias2, dy = (torch.randn(*shape, generator=generator).to(device) for shape in shapes)
    return 2 * x, [weight1 * channels**-0.5, bias1, weight2 * hidden**-0.5, bias2], dy


def test_naive_is_torchs_own():
    x, parameters, _ = make_inputs(5, 12, 20)
    assert torch.equal(mlp(x, *parameters, backend='naive'), reference(x, *parameters))
    with torch.autocast('cpu', torch.bfloat16), use_backend('naive'):
        assert torch.equal(mlp(x, *parameters), reference(x, *parameters))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_torchs_own_on_a_cpu(dtype):
    x, parameters, _ = make_inputs(5, 12, 20)
    x, parameters = x.to(dtype), [value.to(dtype) for value in parameters]
    assert torch.equal(mlp(x, *parameters), reference(x, *parameters))
    if CPU.available:
        with pytest.raises(BackendError, match=r'mlp: the cpu kernel does not take these arguments; x is torch\.float'):
            mlp(x, *parameters, backend='cpu')


@needs_cpu
@pytest.mark.parametrize('one_dnn', [True, False], ids=['one_dnn', 'without'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', [(1, 8, 16), (7, 13, 21), (27000, 24, 100), (65, 384, 100)], ids=str)
def test_cpu_output_and_gradients(shape, dtype, one_dnn):
    """Against float64 of what autocast computes with; the 27000 rows are two pieces."""
    x, parameters, dy = make_inputs(*shape)
    x, dy = x.to(dtype), dy.to(dtype)
    expected = run(reference, x.double(), [value.to(dtype).double() for value in parameters], dy.double())
    with torch.backends.mkldnn.flags(enabled=one_dnn), torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        results, again = (run(partial(mlp, backend='cpu'), x, parameters, dy) for _ in range(2))
        with torch.no_grad():
            inferred = mlp(x, *parameters, backend='cpu')
    assert results[0].dtype == dtype and all(value.dtype == torch.float32 for value in results[2:])
    for value, truth, second in zip(results, expected, again):
        assert relative_error(value, truth) < LIMITS[dtype]
        assert torch.equal(value, second)
    assert relative_error(inferred, expected[0]) < LIMITS[dtype]


@needs_cpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('training', [True, False])
def test_cpu_activation_everywhere(dtype, training):
    """An identity as weights shows GELU itself, tails, infinities and NaN included."""
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([0.0, -0.0, 6e4, -6e4, 1e38, -1e38])])
    x = x.to(dtype).view(-1, 1).expand(-1, 8).contiguous().requires_grad_(training)
    eye, zero = torch.eye(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    y = mlp(x, eye, zero, eye, zero, backend='cpu')
    tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
    torch.testing.assert_close(y.double(), F.gelu(x.double()), **tolerance)
    for value in (float('nan'), float('inf')):
        with torch.no_grad():
            x[1] = value
        assert not mlp(x, eye, zero, eye, zero)[1].isfinite().any()
    if training:
        x = torch.linspace(-9, 9, 64, dtype=dtype).view(8, 8).requires_grad_()
        (dx,) = torch.autograd.grad(mlp(x, eye, zero, eye, zero).sum(), x)
        exact = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(F.gelu(exact).sum(), exact)
        torch.testing.assert_close(dx.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=5e-7)


@needs_cpu
@pytest.mark.parametrize('how', ['in_place', 'data', 'numpy', 'load', 'storage'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_changed_weight_is_the_one_that_counts(how, dtype):
    """However it is written, also where no version counter tells."""
    layers = torch.nn.ModuleList([torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)])
    x = torch.randn(4, 16)
    near = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-2)

    def call():
        weights = (layers[0].weight, layers[0].bias, layers[1].weight, layers[1].bias)
        with torch.no_grad(), torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            return mlp(x, *weights, backend='cpu'), reference(x, *weights)

    for _ in range(3):
        value, expected = call()
        torch.testing.assert_close(value, expected, **near)
        before, weight = value, layers[0].weight
        with torch.no_grad():
            if how == 'in_place':
                weight.mul_(-1.5)
            elif how == 'data':
                weight.data.mul_(-1.5)
            elif how == 'numpy':
                weight.detach().numpy()[:] *= -1.5
            elif how == 'load':
                layers.load_state_dict({name: -1.5 * value for name, value in layers.state_dict().items()})
            else:
                weight.data = -1.5 * weight.data
        value, expected = call()
        torch.testing.assert_close(value, expected, **near)
        assert not torch.allclose(value, before, atol=0.1)


@needs_cpu
def test_cpu_takes_any_strides():
    x, parameters, dy = make_inputs(24, 12, 20)
    views = [
        value.t().contiguous().t() if value.dim() == 2 else value.repeat_interleave(2)[::2] for value in parameters
    ]
    expected = run(reference, x, parameters, dy)
    for other in (
        x.t().contiguous().t(),
        x.repeat(1, 2)[:, :12],
        torch.cat([x.flatten()[:1], x.flatten()])[1:].view(24, 12),
    ):
        for value, truth in zip(run(mlp, other, views, dy.t().contiguous().t()), expected):
            assert relative_error(value, truth) < 1e-5
    assert mlp(x.view(2, 3, 4, 12), *parameters).shape == (2, 3, 4, 12) and mlp(x[:0], *parameters).shape == (0, 12)


@needs_cpu
def test_is_a_well_behaved_op_on_a_cpu():
    x, parameters, dy = make_inputs(10, 12, 20)
    assert torch.ops.mmvmamba.mlp(x, *parameters, False)[1].numel() == 0
    leaves = [value.requires_grad_() for value in (x, *parameters)]
    torch.library.opcheck(torch.ops.mmvmamba.mlp.default, (*leaves, True))
    values = [value.detach() for value in leaves]
    hidden = torch.ops.mmvmamba.mlp(*values, True)[1]
    arguments = (dy, values[0], hidden, values[1], values[3])
    torch.library.opcheck(
        torch.ops.mmvmamba.mlp_backward.default, arguments, test_utils=('test_schema', 'test_faketensor')
    )


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(x=None), TypeError, r'mlp: x must be a tensor of shape \(\.\.\., C\), got NoneType'),
        (dict(weight1=torch.ones(4)), ValueError, r'weight1 must have the dimensions \(hidden, C\)'),
        (dict(weight1=torch.ones(20, 13)), ValueError, r'weight1 has shape \(20, 13\), expected \(20, 12\)'),
        (dict(bias1=torch.ones(19)), ValueError, r'bias1 has shape \(19,\), expected \(20,\)'),
        (dict(weight2=torch.ones(12, 19)), ValueError, r'weight2 has shape \(12, 19\), expected \(12, 20\)'),
        (dict(bias2=torch.ones(12, dtype=torch.int32)), TypeError, r'bias2 must be a floating-point tensor, got int32'),
        (dict(x=torch.ones(5, 12).half()), TypeError, r'mlp: weight1 is float32, but x is float16; outside autocast'),
        (dict(weight1=torch.ones(20, 12).double()), TypeError, r'mlp: weight1 is float64, but x is float32; outside'),
        (dict(bias2=torch.ones(12).double()), TypeError, r'mlp: bias2 is float64, but x is float32; outside autocast'),
    ],
)
def test_bad_input(change, error, message):
    x, parameters, _ = make_inputs(5, 12, 20)
    arguments = dict(zip(('x', 'weight1', 'bias1', 'weight2', 'bias2'), (x, *parameters)))
    with pytest.raises(error, match=message):
        mlp(**{**arguments, **change})


def test_autocast_casts_any_dtype_but_float64():
    x, parameters, _ = make_inputs(5, 12, 20)
    doubles = [value.double() for value in parameters]
    mixed = [value.to(dtype) for value, dtype in zip(parameters, 2 * (torch.float16, torch.bfloat16))]
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(mlp(x, *mixed), reference(x, *mixed))
        assert torch.equal(mlp(x.double(), *doubles), reference(x.double(), *doubles))
        for wrong in ((x, *parameters[:3], doubles[3]), (x.double(), *parameters)):
            with pytest.raises(TypeError, match=r'mlp: (bias2|weight1) is float\d\d, but x is .*; autocast leaves'):
                mlp(*wrong)


def test_meta_tensors_give_the_shape():
    x, parameters, _ = make_inputs(5, 12, 20, device='meta')
    for dtype in (torch.float32, torch.bfloat16):
        y = mlp(x.to(dtype), *(value.to(dtype) for value in parameters))
        assert y.is_meta and y.shape == x.shape and y.dtype == dtype


@needs_gpu
@pytest.mark.parametrize('dtype', LIMITS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize('shape', SHAPES)
def test_gpu_output_and_gradients(shape, dtype):
    """Against float64 of what autocast computes with: input, weights and hidden values rounded to the dtype."""
    x, parameters, dy = make_inputs(*shape, device='cuda')
    x, dy = x.to(dtype), dy.to(dtype)
    rounded = [value.to(dtype).double() for value in parameters]
    expected = run(reference, x.double(), rounded, dy.double())
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        results = run(mlp, x, parameters, dy)
        again = run(mlp, x, parameters, dy)
    assert results[0].dtype == dtype and all(value.dtype == torch.float32 for value in results[2:])
    for value, truth, second in zip(results, expected, again):
        assert relative_error(value, truth) < LIMITS[dtype]
        assert torch.equal(value, second)


@needs_gpu
@pytest.mark.parametrize('dtype', LIMITS, ids=lambda dtype: str(dtype)[6:])
def test_activation_everywhere(dtype):
    """An identity as weights shows GELU itself, tails, infinities and NaN included."""
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([0.0, -0.0, 60000.0, -60000.0])])
    x = x.to('cuda', dtype).view(-1, 1).expand(-1, 8).contiguous()
    eye, zero = torch.eye(8, device='cuda', dtype=dtype), torch.zeros(8, device='cuda', dtype=dtype)
    y = mlp(x, eye, zero, eye, zero)
    tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=5e-7)
    torch.testing.assert_close(y.double(), F.gelu(x.double()), **tolerance)
    for value in (float('nan'), float('inf')):
        x[1] = value
        assert not mlp(x, eye, zero, eye, zero)[1].isfinite().any()


@needs_gpu
@pytest.mark.parametrize('channels', [96, 384])
def test_views_of_one_buffer_as_weights(channels):
    """Parameters in the dtype of the input that begin anywhere in memory, as those of flattened models do."""
    x, parameters, dy = make_inputs(200, channels, 4 * channels, device='cuda')
    x, dy = x.half(), dy.half()
    flat = torch.cat([torch.zeros(1, device='cuda'), *map(torch.flatten, parameters)]).half()
    parts = flat[1:].split([value.numel() for value in parameters])
    views = [part.view(value.shape) for part, value in zip(parts, parameters)]
    expected = run(reference, x.double(), [view.double() for view in views], dy.double())
    for value, truth in zip(run(mlp, x, views, dy), expected):
        assert relative_error(value, truth) < LIMITS[torch.float16]
    with torch.no_grad():
        assert relative_error(mlp(x, *views), expected[0]) < LIMITS[torch.float16]


@needs_gpu
def test_without_gradients_nothing_is_kept():
    x, parameters, _ = make_inputs(64, 16, 64, device='cuda')
    expected = reference(x, *parameters)
    assert relative_error(mlp(x, *parameters), expected) < 1e-6
    assert torch.ops.mmvmamba.mlp(x, *parameters, False)[1].numel() == 0


@needs_gpu
def test_is_a_well_behaved_op():
    x, parameters, _ = make_inputs(10, 32, 64, device='cuda')
    leaves = [value.requires_grad_() for value in (x, *parameters)]
    torch.library.opcheck(torch.ops.mmvmamba.mlp.default, (*leaves, True))
