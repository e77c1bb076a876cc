"""Any arguments of the ops around the scan give torch's own numbers, or one error that names the argument."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from mmvmamba.ops import add_layer_norm, conv2d_channel_last, depthwise_conv_silu, layer_norm, linear, mlp
from tests.cases import cases
from tests.test_ops.op_inputs import (
    DEVICES,
    ELSEWHERE,
    FAULTS,
    LAYOUTS,
    ROUNDING,
    SPOILS,
    assert_refused,
    broken,
    lay_out,
    spoil,
)

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _no_tf32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def reference_norm(x, weight, bias, shift=None):
    return F.layer_norm(x if shift is None else x + shift, x.shape[-1:], weight, bias)


def reference_sum(x, branch, weight, bias, factors=None):
    total = x + (branch if factors is None else factors.view(-1, *(1,) * (x.dim() - 1)) * branch)
    return reference_norm(total, weight, bias)


def reference_linear(x, weight):
    return F.linear(x, weight)


def reference_mlp(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def reference_depthwise(x, weight, bias=None):
    padding = weight.shape[-1] // 2
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[-1])
    return F.silu(y).permute(0, 2, 3, 1)


def reference_conv(x, weight, bias=None, stride=1, padding=0):
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding).permute(0, 2, 3, 1)


OPS = dict(
    layer_norm=(layer_norm, reference_norm),
    gelu_layer_norm=(partial(layer_norm, gelu=True), lambda **arguments: F.gelu(reference_norm(**arguments))),
    add_layer_norm=(lambda **arguments: add_layer_norm(**arguments)[1], reference_sum),
    linear=(linear, reference_linear),
    mlp=(mlp, reference_mlp),
    depthwise_conv_silu=(depthwise_conv_silu, reference_depthwise),
    conv2d_channel_last=(conv2d_channel_last, reference_conv),
)


@st.composite
def layer_arguments(draw):
    """An op's name and valid arguments."""
    op = draw(st.sampled_from(sorted(OPS)))
    batch, height, width, channels, out = (draw(st.integers(1, 5)) for _ in range(5))
    kernel = draw(st.sampled_from((1, 3)))
    maps = dict(x=(batch, height + 2, width + 2, channels))
    shapes = dict(
        layer_norm=dict(maps, weight=(channels,), bias=(channels,), shift=(channels,)),
        gelu_layer_norm=dict(maps, weight=(channels,), bias=(channels,), shift=(channels,)),
        add_layer_norm=dict(maps, branch=maps['x'], weight=(channels,), bias=(channels,), factors=(batch,)),
        linear=dict(x=maps['x'], weight=(out, channels)),
        mlp=dict(maps, weight1=(out, channels), bias1=(out,), weight2=(channels, out), bias2=(channels,)),
        depthwise_conv_silu=dict(maps, weight=(channels, 1, kernel, kernel), bias=(channels,)),
        conv2d_channel_last=dict(maps, weight=(out, channels, kernel, kernel), bias=(out,)),
    )[op]
    optional = dict(
        layer_norm='shift',
        gelu_layer_norm='shift',
        add_layer_norm='factors',
        depthwise_conv_silu='bias',
        conv2d_channel_last='bias',
    ).get(op)
    if optional and draw(st.booleans()):
        del shapes[optional]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, device = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DEVICES))
    arguments = {name: torch.randn(size, generator=generator, dtype=dtype) for name, size in shapes.items()}
    arguments = {name: value.to(device) for name, value in arguments.items()}
    arguments['x'] = lay_out(arguments['x'], draw(st.sampled_from(LAYOUTS)))
    return op, arguments


@cases(quick=60, full=1000, case=layer_arguments())
def test_agrees_with_torch_in_float64(case):
    op, arguments = case
    function, reference = OPS[op]
    out = function(**arguments)
    expected = reference(**{name: value.double() for name, value in arguments.items()})
    assert out.dtype == arguments['x'].dtype and out.shape == expected.shape
    limit = 200 * ROUNDING[out.dtype]
    assert ((out.double() - expected).abs() <= limit * (10 + expected.abs())).all()


@cases(
    quick=40,
    full=400,
    case=layer_arguments(),
    which=st.integers(0, 4),
    place=st.integers(0, 10**6),
    value=st.sampled_from(SPOILS),
)
def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(case, which, place, value):
    op, arguments = case
    name = spoil(arguments, which, place, value)
    function, reference = OPS[op]
    out = function(**arguments)
    expected = reference(**{name: value.double() for name, value in arguments.items()})
    if (op, name) == ('depthwise_conv_silu', 'weight'):  # whether a weight is multiplied by padding is not promised
        edge = arguments[name].shape[-1] // 2
        out, expected = (y[:, edge : y.shape[1] - edge, edge : y.shape[2] - edge] for y in (out, expected))
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite)
    out, expected = out[finite].double(), expected[finite]
    assert ((out - expected).abs() <= 200 * ROUNDING[arguments['x'].dtype] * (10 + expected.abs())).all()


@cases(quick=80, full=1200, case=layer_arguments(), fault=st.sampled_from(FAULTS), which=st.integers(0, 4))
def test_refuses_one_broken_argument(case, fault, which):
    op, arguments = case
    names = list(arguments)
    name = names[which % len(names)]
    any_dimensions = (op.endswith('layer_norm') or op in ('linear', 'mlp')) and name == 'x'
    if (fault == 'dtype' and op not in ('linear', 'mlp')) or (any_dimensions and fault == 'dimension'):
        fault = 'text'  # for most other dtypes are right, and for some any number of dimensions
    if fault in ELSEWHERE and name == 'x':
        name = names[1]
    arguments[name] = broken(arguments[name], fault, -1)
    function = dict(
        layer_norm=layer_norm,
        gelu_layer_norm=layer_norm,
        add_layer_norm=add_layer_norm,
        linear=linear,
        mlp=mlp,
        depthwise_conv_silu=depthwise_conv_silu,
        conv2d_channel_last=conv2d_channel_last,
    )[op]
    assert_refused(function, arguments)


@pytest.mark.parametrize(
    'change',
    [dict(stride=0), dict(stride=1.0), dict(stride=True), dict(padding=-1), dict(padding='same'), dict(x=(1, 2, 2, 4))],
    ids=str,
)
def test_convolution_refuses_a_broken_option(change):
    shape = change.pop('x', (1, 5, 5, 4))
    arguments = dict(x=torch.ones(shape), weight=torch.ones(2, 4, 3, 3), **change)
    assert_refused(conv2d_channel_last, arguments, names=change or ['x'])
