"""Any arguments of layer_norm give the right result, or one error that names the argument."""

import pytest
import torch
from hypothesis import strategies as st

from mmvmamba.ops import layer_norm
from tests.cases import cases
from tests.test_ops.op_inputs import (
    DEVICES,
    DTYPES,
    ELSEWHERE,
    FAULTS,
    LAYOUTS,
    ROUNDING,
    assert_refused,
    broken,
    lay_out,
)


@st.composite
def norm_arguments(draw):
    """Valid arguments of ``layer_norm``."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3))) + (draw(st.integers(1, 9)),)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = dict(x=shape, weight=shape[-1:], bias=shape[-1:])
    arguments = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in shapes.items()}
    device = draw(st.sampled_from(DEVICES))
    arguments = {name: value.to(device, draw(st.sampled_from(DTYPES))) for name, value in arguments.items()}
    if arguments['x'].numel():
        arguments['x'] = lay_out(arguments['x'], draw(st.sampled_from(LAYOUTS)))
    if draw(st.booleans()):
        arguments['out_dtype'] = draw(st.sampled_from(DTYPES))
    return {**arguments, 'eps': draw(st.sampled_from((1e-5, 1, 0.1)))}


@cases(quick=40, full=600, arguments=norm_arguments())
def test_layer_norm_agrees_with_float64(arguments):
    x, weight, bias = (arguments[name].double() for name in ('x', 'weight', 'bias'))
    out = layer_norm(**arguments)
    assert out.dtype == arguments.get('out_dtype', arguments['x'].dtype) and out.shape == x.shape
    centred = x - x.mean(-1, keepdim=True)
    scale = weight / (centred.square().mean(-1, keepdim=True) + arguments['eps']).sqrt()
    expected = centred * scale + bias
    # the arithmetic may be that of the coarsest of the dtypes; the mean is rounded, which shows where values are close
    coarsest = max(ROUNDING[arguments[name].dtype] for name in ('x', 'weight', 'bias'))
    limit = 8 * max(coarsest, ROUNDING[out.dtype])
    size = 1 + expected.abs() + scale.abs() * x.abs().amax(-1, keepdim=True)
    assert ((out.double() - expected).abs() <= limit * size).all()


@cases(quick=40, full=400, arguments=norm_arguments(), fault=st.sampled_from(FAULTS), which=st.integers(0, 2))
def test_layer_norm_refuses_one_broken_argument(arguments, fault, which):
    name = ('x', 'weight', 'bias')[which]
    if fault == 'dtype' or (name == 'x' and fault == 'dimension'):
        fault = 'text'  # any dtypes and any number of dimensions are right
    if fault in ELSEWHERE and name == 'x':
        name = 'weight'
    arguments[name] = broken(arguments[name], fault, -1 if fault in ('empty', 'size') else 0)
    assert_refused(layer_norm, arguments)


@pytest.mark.parametrize(
    'change',
    [dict(eps='a'), dict(eps=True), dict(eps=-1.0), dict(eps=float('nan')), dict(out_dtype=torch.int32)],
    ids=str,
)
def test_layer_norm_refuses_a_broken_option(change):
    ones = torch.ones(3)
    assert_refused(layer_norm, {**dict(x=ones, weight=ones, bias=ones), **change}, names=change)
