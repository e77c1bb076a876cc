"""Convolutions of channel-last maps: torch's numbers, of the kernels against float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from mmvmamba.ops import backend_report, conv2d_channel_last, depthwise_conv_silu
from tests.test_ops.ss2d_inputs import relative_error, run

STATUS = {status.name: status for status in backend_report()}
needs_gpu = pytest.mark.skipif(not STATUS['cuda'].available, reason=STATUS['cuda'].reason)
needs_cpu = pytest.mark.skipif(not STATUS['cpu'].available, reason=STATUS['cpu'].reason)
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
by_dtype = pytest.mark.parametrize('dtype', LIMITS, ids=lambda dtype: f'{dtype}'.replace('torch.', ''))
with_or_without_bias = pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no_bias'])
# (B, H, W, C_in, C_out, kernel, stride, padding): stems, downsampling, and sizes that the stride does not divide
CONVOLUTIONS = [
    (2, 32, 40, 3, 48, 3, 2, 1),
    (2, 32, 40, 3, 96, 4, 4, 0),
    (3, 17, 23, 48, 96, 3, 2, 1),
    (2, 9, 6, 16, 36, 2, 2, 0),
    (1, 5, 5, 8, 6, 3, 1, 1),
    (1, 1, 1, 8, 16, 3, 2, 1),
]


@pytest.fixture(autouse=True)
def _exact_cudnn():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def make_inputs(shape, weight_shape, bias, dtype=torch.float32, device='cpu'):
    """A map, its parameters, and numbers to draw dy from."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator) for size in (shape, weight_shape))
    weight *= weight[0].numel() ** -0.5
    parameters = [weight, torch.randn(weight_shape[0], generator=generator)][: 1 + bias]
    return x.to(device, dtype), [value.to(device) for value in parameters], generator


def depthwise(shape, bias, dtype=torch.float32, device='cpu'):
    """Inputs of ``depthwise_conv_silu``; the gradient dy is not contiguous."""
    x, parameters, generator = make_inputs(shape, (shape[-1], 1, 3, 3), bias, dtype, device)
    dy = torch.randn(*shape[:3], 2 * shape[-1], generator=generator)[..., ::2]
    return x, parameters, dy.to(device, dtype)


def torch_depthwise(x, weight, bias=None):
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return F.silu(y).permute(0, 2, 3, 1)


def torch_conv(x, weight, bias, stride, padding):
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding).permute(0, 2, 3, 1)


def in_float64(function, x, parameters, dy):
    return run(function, x.double(), [value.double() for value in parameters], dy.double())


# ---- anywhere -------------------------------------------------------------------------------------------------------
@with_or_without_bias
@pytest.mark.parametrize('kernel', [1, 3, 5])
def test_naive_depthwise_is_torchs_own(kernel, bias):
    x, parameters, _ = make_inputs((2, 5, 7, 6), (6, 1, kernel, kernel), bias)
    assert torch.equal(depthwise_conv_silu(x, *parameters, backend='naive'), torch_depthwise(x, *parameters))
    torch.testing.assert_close(depthwise_conv_silu(x, *parameters), torch_depthwise(x, *parameters))


@needs_cpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@with_or_without_bias
@pytest.mark.parametrize(
    'shape', [(1, 1, 1, 1), (2, 7, 5, 12), (1, 1, 30, 8), (3, 35, 1, 36), (2, 2, 3, 260), (2, 33, 17, 96)], ids=str
)
def test_depthwise_on_cpu(shape, bias, dtype):
    x, parameters, dy = depthwise(shape, bias, dtype)
    op = partial(depthwise_conv_silu, backend='cpu')
    results, again = (run(op, x, parameters, dy) for _ in range(2))
    assert [value.dtype for value in results] == [dtype, dtype] + [torch.float32] * len(parameters)
    assert all(value.is_contiguous() for value in results)
    for value, expected, second in zip(results, in_float64(torch_depthwise, x, parameters, dy), again):
        assert torch.equal(value, second)
        assert relative_error(value, expected) < LIMITS[dtype]


@needs_cpu
def test_depthwise_on_cpu_takes_any_address_and_stride():
    x, parameters, dy = depthwise((2, 9, 6, 16), True)
    expected = run(depthwise_conv_silu, x, parameters, dy)
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for other in (shifted, first, torch.cat([x, x], dim=-1)[..., :16]):
        for value, truth in zip(run(depthwise_conv_silu, other, parameters, dy), expected):
            assert torch.equal(value, truth)
    alone = depthwise_conv_silu(x[1:], *parameters)
    assert torch.equal(alone, expected[0][1:])


@needs_cpu
@with_or_without_bias
def test_depthwise_is_a_well_behaved_op_on_a_cpu(bias):
    x, parameters, dy = depthwise((2, 5, 6, 8), bias)
    parameters += [None] * (not bias)
    tests = ('test_schema', 'test_faketensor')
    op = torch.ops.mmvmamba.depthwise_conv_silu_backward.default
    torch.library.opcheck(op, (dy, x, *parameters), test_utils=tests)
    leaves = [value if value is None else value.requires_grad_() for value in (x, *parameters)]
    torch.library.opcheck(torch.ops.mmvmamba.depthwise_conv_silu.default, leaves)


@with_or_without_bias
@pytest.mark.parametrize('case', CONVOLUTIONS, ids=str)
def test_conv_on_cpu_is_torchs_own(case, bias):
    *shape, out_channels, kernel, stride, padding = case
    x, parameters, _ = make_inputs(shape, (out_channels, shape[-1], kernel, kernel), bias)
    parameters += [None] * (not bias)
    out = conv2d_channel_last(x, *parameters, stride, padding)
    assert torch.equal(out, torch_conv(x, *parameters, stride, padding))


@needs_cpu
@with_or_without_bias
@pytest.mark.parametrize('x_grad', [True, False])
@pytest.mark.parametrize('case', CONVOLUTIONS[:3], ids=str)
def test_the_op_of_a_cpu(case, bias, x_grad):
    *shape, out_channels, kernel, stride, padding = case
    x, parameters, _ = make_inputs(shape, (out_channels, shape[-1], kernel, kernel), bias)
    leaves = [value.requires_grad_() for value in (x.requires_grad_(x_grad), *parameters)][1 - x_grad :]
    results = []
    for backend in ('cpu', 'naive'):
        out = conv2d_channel_last(x, *parameters, *[None] * (not bias), stride, padding, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for value, expected in zip(*results):
        assert value.is_contiguous() and relative_error(value, expected) < 1e-5
    tensors = (x, *parameters, *[None] * (not bias))
    torch.library.opcheck(torch.ops.mmvmamba.conv2d_channel_last.default, (*tensors, stride, padding))


@needs_cpu
def test_a_graph_that_trains_keeps_maps_as_they_are():
    """Between torch's own convolutions its compiler would write them channel-last, being channel-last already."""
    kept = []

    def inspect(graph, inputs):
        kept.extend(node for node in graph.graph.nodes if node.target is torch.ops.aten.convolution.default)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    x, parameters, _ = make_inputs((2, 9, 10, 8), (8, 8, 3, 3), True)
    compiled = torch.compile(conv2d_channel_last, fullgraph=True, backend=aot_autograd(fw_compiler=inspect))
    compiled(x.clone().requires_grad_(), *parameters, 2, 1).sum().backward()  # past a frozen convolution
    compiled(x, *[value.requires_grad_() for value in parameters], 2, 1).sum().backward()
    assert not kept
    with torch.no_grad():
        compiled(x, *parameters, 2, 1)
    assert len(kept) == 1  # torch's own, whose weights freezing packs


@pytest.mark.parametrize('strict', [False, True])
def test_exported_programs_have_torchs_own_convolution(strict):
    class Layer(torch.nn.Conv2d):
        def forward(self, x):
            return conv2d_channel_last(x, self.weight, self.bias, 2, 1)

    program = torch.export.export(Layer(8, 8, 3), (torch.randn(2, 9, 10, 8),), strict=strict)
    assert not [node for node in program.graph.nodes if 'mmvmamba' in str(node.target)]


def test_out_dtype_is_autocasts_arithmetic():
    x, parameters, _ = make_inputs((2, 5, 7, 8), (8, 1, 3, 3), True)
    with torch.autocast('cpu', torch.bfloat16):
        expected = torch_depthwise(x, *parameters)
    y = depthwise_conv_silu(x, *parameters, out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16 and relative_error(y, expected) < LIMITS[torch.bfloat16]
    assert torch.equal(depthwise_conv_silu(x, *parameters, out_dtype=torch.bfloat16, backend='naive'), expected)
    assert depthwise_conv_silu(x.double(), *parameters).dtype == torch.float64


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(x=torch.ones(2, 3, 4)), r'x must have the dimensions \(B, H, W, C\), got shape \(2, 3, 4\)'),
        (dict(weight=torch.ones(4, 2, 3, 3)), r'weight has shape \(4, 2, 3, 3\), expected \(4, 1, 3, 3\)'),
        (dict(weight=torch.ones(4, 1, 2, 2)), r'kernels of 2x2, expected an odd size'),
        (dict(bias=torch.ones(3)), r'bias has shape \(3,\), expected \(4,\)'),
        (dict(x=torch.ones(1, 0, 2, 4)), r'x has an empty dimension, got shape \(1, 0, 2, 4\) for \(B, H, W, C\)'),
        (dict(x=torch.ones(1, 2, 2, 0)), r'x has an empty dimension, got shape \(1, 2, 2, 0\)'),
        (dict(weight=torch.ones(0, 1, 3, 3), bias=None), r'weight has an empty dimension, got shape \(0, 1, 3, 3\)'),
    ],
)
def test_bad_shapes_are_named(change, words):
    arguments = dict(x=torch.ones(1, 2, 2, 4), weight=torch.ones(4, 1, 3, 3), bias=torch.ones(4))
    with pytest.raises(ValueError, match=words):
        depthwise_conv_silu(**{**arguments, **change})


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(weight=torch.ones(2, 4, 0, 0)), r'weight has an empty dimension, got shape \(2, 4, 0, 0\)'),
        (dict(weight=torch.ones(0, 4, 3, 3)), r'weight has an empty dimension, got shape \(0, 4, 3, 3\)'),
        (dict(x=torch.ones(1, 2, 2, 0), weight=torch.ones(2, 0, 1, 1)), r'x has an empty dimension'),
        (dict(x=torch.ones(1, 0, 2, 4)), r'x has an empty dimension, got shape \(1, 0, 2, 4\)'),
        (dict(stride=0), r'stride is 0, expected a number from 1 to 2147483647'),
        (dict(stride=2**70), r'stride is an integer of 71 bits, expected a number from 1 to 2147483647'),
        (dict(padding=-1), r'padding is -1, expected a number from 0'),
        (dict(padding=2**62), r'padding is 4611686018427387904, expected a number from 0 to 2147483647'),
        (dict(padding=10**5000), r'padding is an integer of 16610 bits'),
    ],
)
def test_bad_sizes_are_named(change, words):
    arguments = dict(x=torch.ones(1, 2, 2, 4), weight=torch.ones(2, 4, 1, 1))
    with pytest.raises(ValueError, match=f'conv2d_channel_last: {words}'):
        conv2d_channel_last(**{**arguments, **change})


def test_the_batch_may_be_empty():
    x = torch.ones(0, 5, 5, 4)
    assert depthwise_conv_silu(x, torch.ones(4, 1, 3, 3)).shape == x.shape
    assert conv2d_channel_last(x, torch.ones(2, 4, 3, 3), stride=2).shape == (0, 2, 2, 2)


@pytest.mark.parametrize('change', [dict(x=3), dict(weight=torch.ones(4, 4, 3, 3).int()), dict(out_dtype=torch.int8)])
def test_bad_types_are_refused(change):
    arguments = dict(x=torch.ones(1, 2, 2, 4), weight=torch.ones(4, 4, 3, 3))
    with pytest.raises(TypeError, match=f'conv2d_channel_last: {next(iter(change))}'):
        conv2d_channel_last(**{**arguments, **change})


# ---- on the GPU -----------------------------------------------------------------------------------------------------
@needs_gpu
@by_dtype
@with_or_without_bias
@pytest.mark.parametrize(
    'shape',
    [
        (1, 1, 1, 4),
        (2, 7, 5, 12),
        (1, 1, 130, 8),
        (3, 130, 1, 36),
        (2, 2, 3, 260),
        (2, 33, 57, 96),
        (1, 200, 90, 64),
        (128, 7, 7, 768),
        (8, 56, 56, 96),
        (2, 3, 4, 6),
    ],
    ids=str,
)
def test_depthwise_on_gpu(shape, bias, dtype):
    x, parameters, dy = depthwise(shape, bias, dtype, 'cuda')
    results = run(depthwise_conv_silu, x, parameters, dy)
    assert [value.dtype for value in results] == [dtype, dtype] + [torch.float32] * len(parameters)
    assert shape[-1] % 4 or all(value.is_contiguous() for value in results)
    for value, expected in zip(results, in_float64(torch_depthwise, x, parameters, dy)):
        assert relative_error(value, expected) < LIMITS[dtype]
    for first, second in zip(results, run(depthwise_conv_silu, x, parameters, dy)):
        assert torch.equal(first, second)


@needs_gpu
def test_depthwise_takes_any_address_and_stride():
    x, parameters, dy = depthwise((2, 9, 6, 16), True, torch.float16, 'cuda')
    expected = run(depthwise_conv_silu, x, parameters, dy)
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    strided = torch.cat([x, x], dim=-1)[..., :16]
    for other in (shifted, strided):
        y, dx, *_ = run(depthwise_conv_silu, other, parameters, dy)
        assert torch.equal(y, expected[0]) and torch.equal(dx, expected[1])


@needs_gpu
def test_extreme_values_stay_finite():
    x = torch.tensor([-6e4, -100.0, 0.0, 6e4], device='cuda').view(1, 1, 1, 4)
    weight = torch.zeros(4, 1, 3, 3, device='cuda')
    weight[:, :, 1, 1] = 1
    y, dx, _ = run(depthwise_conv_silu, x, [weight], torch.ones_like(x))
    torch.testing.assert_close(y, F.silu(x))
    torch.testing.assert_close(dx.flatten(), torch.tensor([0, 0, 0.5, 1], device='cuda'))


@needs_gpu
@by_dtype
@with_or_without_bias
@pytest.mark.parametrize('case', CONVOLUTIONS, ids=str)
def test_conv_on_gpu(case, bias, dtype):
    *shape, out_channels, kernel, stride, padding = case
    x, parameters, generator = make_inputs(shape, (out_channels, shape[-1], kernel, kernel), bias, dtype, 'cuda')

    def ours(x, weight, bias=None):
        return conv2d_channel_last(x, weight, bias, stride, padding)

    def theirs(x, weight, bias=None):
        return torch_conv(x, weight, bias, stride, padding)

    out_shape = theirs(x.float(), *parameters).shape
    dy = torch.randn(*out_shape[:3], 2 * out_channels, generator=generator)[..., ::2].to('cuda', dtype)
    results = run(ours, x, parameters, dy)
    assert [value.dtype for value in results] == [dtype, dtype] + [torch.float32] * len(parameters)
    assert all(value.is_contiguous() for value in results)
    rounded = [value.to(dtype) for value in parameters]
    for value, expected in zip(results, in_float64(theirs, x, rounded, dy)):
        assert relative_error(value, expected) < LIMITS[dtype]
    for first, second in zip(results, run(ours, x, parameters, dy)):
        assert torch.equal(first, second)


@needs_gpu
def test_an_image_gets_no_gradient():
    x, parameters, _ = make_inputs((2, 8, 8, 3), (8, 3, 3, 3), True, torch.float16, 'cuda')
    leaves = [value.requires_grad_() for value in parameters]
    conv2d_channel_last(x, *leaves, 2, 1).float().sum().backward()
    assert x.grad is None and all(value.grad is not None for value in leaves)


@needs_gpu
def test_autocast_does_not_change_the_dtype_that_was_asked_for():
    x, parameters, _ = make_inputs((2, 8, 8, 4), (8, 4, 3, 3), True, torch.float32, 'cuda')
    with torch.autocast('cuda', torch.float16):
        assert conv2d_channel_last(x, *parameters).dtype == torch.float32
        assert conv2d_channel_last(x, *parameters, out_dtype=torch.float16).dtype == torch.float16


@needs_gpu
@with_or_without_bias
@pytest.mark.parametrize('x_grad', [True, False])
def test_are_well_behaved_ops(bias, x_grad):
    x, parameters, _ = depthwise((2, 5, 6, 8), bias, device='cuda')
    leaves = [value.requires_grad_() for value in parameters] + [None] * (not bias)
    torch.library.opcheck(torch.ops.mmvmamba.depthwise_conv_silu.default, (x.requires_grad_(x_grad), *leaves))
    x, parameters, _ = make_inputs((2, 5, 6, 8), (12, 8, 3, 3), bias, device='cuda')
    leaves = [value.requires_grad_() for value in parameters] + [None] * (not bias)
    torch.library.opcheck(torch.ops.mmvmamba.conv2d_channel_last.default, (x.requires_grad_(x_grad), *leaves, 2, 1))


@needs_gpu
def test_backward_ops_have_the_schema_they_declare():
    x, (weight, bias), dy = depthwise((2, 5, 6, 8), True, device='cuda')
    tests = ('test_schema', 'test_faketensor')
    op = torch.ops.mmvmamba.depthwise_conv_silu_backward.default
    torch.library.opcheck(op, (dy, x, weight, bias), test_utils=tests)
    torch.library.opcheck(op, (dy, x, weight, None), test_utils=tests)
    weight = torch.randn(8, 8, 3, 3, device='cuda')
    op = torch.ops.mmvmamba.conv2d_channel_last_backward.default
    for flags in ((True, True), (False, False)):
        torch.library.opcheck(op, (dy, x, weight, 1, 1, *flags), test_utils=tests)


@needs_gpu
@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_into_one_graph(dynamic):
    torch._dynamo.reset()
    x, (weight, bias), _ = make_inputs((2, 9, 10, 8), (8, 8, 3, 3), True, torch.float16, 'cuda')
    depthwise_weight = weight[:, :1].contiguous()

    def function(x, weight, bias, depthwise_weight):
        y = depthwise_conv_silu(x, depthwise_weight, bias)
        return conv2d_channel_last(y, weight, bias, 2, 1)

    dy = torch.randn(2, 5, 5, 8, device='cuda')
    parameters = [weight, bias, depthwise_weight]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for value, expected in zip(run(compiled, x, parameters, dy), run(function, x, parameters, dy)):
        assert value.dtype == expected.dtype and relative_error(value, expected) < 2e-3
