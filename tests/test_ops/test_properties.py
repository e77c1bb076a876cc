"""Any arguments of the ops give the right result, or one error that names the argument; never a crash or a mistake."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from mmvmamba.ops import SCAN_MODES, BackendError, cross_merge, cross_scan, layer_norm, selective_scan, ss2d_scan
from tests.cases import cases
from tests.test_ops.op_inputs import (
    DEVICES,
    DTYPES,
    ELSEWHERE,
    FAULTS,
    LAYOUTS,
    SPOILS,
    backends,
    broken,
    lay_out,
    lengths,
    scan_arguments,
    spoil,
)
from tests.test_ops.oracle import oracle
from tests.test_ops.scan_inputs import GRADIENT_LIMIT, assert_scan_close, run_scan, run_truth

ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_refused(op, arguments, names=None):
    """Hold a call to its contract for bad input: a documented error type, whose message names op and argument."""
    with pytest.raises((TypeError, ValueError, BackendError)) as caught:
        op(**arguments)
    message = str(caught.value)
    assert message.startswith(f'{op.__name__}: ') or 'backend' in message, message
    words = message.replace(',', ' ').replace(':', ' ').split()
    assert set(names or arguments) & set(words), message


@cases(quick=150, full=3500, case=scan_arguments(growth=True))
def test_selective_scan_gives_the_sum_of_its_equation(case):
    arguments, large = case
    out = selective_scan(**arguments)
    assert out.dtype == arguments.get('out_dtype', arguments['u'].dtype) and out.is_contiguous()
    del arguments['backend']
    expected, size, floor = oracle(**arguments)
    limit = 1e-12 if arguments['u'].dtype == torch.float64 else 2e-5
    error = abs(out.double().cpu().numpy() - expected)
    allowed = limit * (50 if large else 1) * (size + floor) + ROUNDING[out.dtype] * (abs(expected) + floor)
    allowed += float(torch.finfo(out.dtype).smallest_normal) + floor
    # where a result leaves the range of its dtype, or a state that of float32, infinity is the documented answer
    inside = (size < 1e36) & (abs(expected) < 0.999 * torch.finfo(out.dtype).max)
    assert (error[inside] <= allowed[inside]).all(), (error[inside] / allowed[inside]).max()


@cases(
    quick=80,
    full=800,
    case=scan_arguments(),
    fault=st.sampled_from(FAULTS),
    which=st.integers(0, 6),
    axis=st.integers(0, 3),
)
def test_selective_scan_refuses_one_broken_argument(case, fault, which, axis):
    arguments, _ = case
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    name = names[which % len(names)]
    arguments[name] = broken(arguments[name], fault, axis)
    assert_refused(selective_scan, arguments, names=('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias'))


@pytest.mark.parametrize(
    'change',
    [
        dict(delta_softplus='yes'),
        dict(delta_softplus=1),
        dict(delta_softplus=None),
        dict(out_dtype=torch.int32),
        dict(out_dtype='half'),
        dict(backend='gpu'),
        dict(backend=3),
        dict(backend=['cpu']),
    ],
    ids=str,
)
def test_selective_scan_refuses_a_broken_option(change):
    ones = torch.ones(1, 2, 3)
    arguments = dict(u=ones, delta=ones, A=-torch.ones(2, 1), B=torch.ones(1, 1, 1, 3), C=torch.ones(1, 1, 1, 3))
    assert_refused(selective_scan, {**arguments, **change}, names=change)


@cases(
    quick=40,
    full=600,
    case=scan_arguments(scales=('normal',), max_channels=36),
    use_out=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_selective_scan_has_the_gradients_of_its_equation(case, use_out, seed):
    arguments, _ = case
    softplus, out_dtype, backend = (arguments.pop(name, None) for name in ('delta_softplus', 'out_dtype', 'backend'))
    dout = torch.randn(arguments['u'].shape, generator=torch.Generator().manual_seed(seed)).to(arguments['u'].device)
    dout = dout if use_out else dout[:, :1].expand(arguments['u'].shape)
    result = run_scan(arguments, dout, softplus, out_dtype, backend=backend)
    dout = dout.to(result['out'].dtype)
    truth = run_truth(arguments, dout, delta_softplus=softplus)
    # sums over a batch or over time may cancel to nothing: rounding is relative to the size of their terms
    signless = {name: value.abs() if name in 'uBCD' else value for name, value in arguments.items()}
    sizes = run_truth(signless, dout.abs(), delta_softplus=softplus)
    sizes['ddelta_bias'] = truth['ddelta'].abs().sum((0, 2))
    small = 1e-12 if arguments['u'].dtype == torch.float64 else 5e-6
    for name in ('last_state', 'dA', 'dD', 'ddelta_bias'):
        if name in truth:
            error, expected = (result[name].double() - truth[name]).norm(), truth[name].norm()
            limit = small * sizes[name].norm()
            if name != 'last_state':
                limit += GRADIENT_LIMIT[arguments['u'].dtype] * expected
            assert error <= limit, f'{name}: error {error:.2e}, limit {limit:.2e}'
            del truth[name]
    assert_scan_close(result, truth, arguments['u'].dtype)


@cases(
    quick=80,
    full=800,
    case=scan_arguments(scales=('normal',), naive=False),
    which=st.integers(0, 6),
    place=st.integers(0, 10**6),
    value=st.sampled_from(SPOILS),
)
def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(case, which, place, value):
    arguments, _ = case
    spoil(arguments, which, place, value)
    out, expected = selective_scan(**arguments), selective_scan(**{**arguments, 'backend': 'naive'})
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite)
    tolerance = max(1e-4, 4 * ROUNDING[out.dtype])
    if finite.any():
        out, expected = out[finite].double(), expected[finite].double()
        assert ((out - expected).abs() <= tolerance * (1 + expected.abs().max())).all()


MAPS = dict(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    device=st.sampled_from(DEVICES),
    layout=st.sampled_from(LAYOUTS),
    scan_mode=st.sampled_from(SCAN_MODES),
)


@cases(quick=80, full=1000, **MAPS, channel_last=st.booleans())
def test_cross_scan_and_merge_are_exact(batch, channels, height, width, dtype, device, layout, scan_mode, channel_last):
    pixels = torch.arange(batch * channels * height * width).remainder(251).to(device, dtype)
    x = lay_out(
        pixels.view((batch, height, width, channels) if channel_last else (batch, channels, height, width)), layout
    )
    scanned = cross_scan(x, scan_mode, channel_last)
    assert torch.equal(scanned, cross_scan(x, scan_mode, channel_last, backend='naive'))
    merged = cross_merge(lay_out(scanned, layout), (height, width), scan_mode, channel_last)
    expected = 4 * (x if layout != 'overlapping' else x[:1].expand(x.shape)).double()
    assert torch.equal(merged.double(), expected.to(dtype).double())


@cases(
    quick=60,
    full=600,
    **{**MAPS, 'scan_mode': st.sampled_from(('cross2d', 'diagonal', '', None, 3, ('cross2d',)))},
    fault=st.sampled_from((None, *FAULTS)),
    axis=st.integers(0, 3),
    size=st.sampled_from((None, 'swapped', (0, 0), (-1, -4), 'ab', (2.0, 3), (1, 2, 3), [2])),
)
def test_cross_ops_refuse(batch, channels, height, width, dtype, device, layout, scan_mode, fault, axis, size):
    x = torch.ones(batch, channels, height, width, dtype=dtype, device=device)
    y = torch.ones(batch, 4, channels, height * width, dtype=dtype, device=device)
    true_size = (height, width)
    # broken along an axis that the op can not know, a map stays a map
    if fault == 'dtype' or (fault == 'size' and axis in (0, 2)) or fault in ELSEWHERE:
        fault = None
    if fault is not None:
        x = broken(x, fault, axis) if fault != 'size' else x
        y = broken(y, fault, axis)
    if fault not in (None, 'size') or scan_mode != 'cross2d':
        assert_refused(cross_scan, dict(x=x, scan_mode=scan_mode))
    else:
        cross_scan(x, scan_mode)
    size = true_size if size in (None, 'swapped') else size
    if fault is not None or scan_mode != 'cross2d' or size != true_size:
        assert_refused(cross_merge, dict(y=y, size=size, scan_mode=scan_mode))
    else:
        assert cross_merge(y, size, scan_mode).shape == (batch, channels, height, width)


@st.composite
def ss2d_arguments(draw, naive=True):
    """Valid arguments of ``ss2d_scan``; with ``naive`` the backend may be the naive one."""
    batch, channels, rank = draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    states, dtype = draw(st.sampled_from((1, 1, 3))), draw(st.sampled_from(DTYPES))
    device = draw(st.sampled_from(DEVICES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = dict(
        x=(batch, channels, height, width),
        x_proj_weight=(4, rank + 2 * states, channels),
        dt_projs_weight=(4, channels, rank),
        dt_projs_bias=(4, channels),
        A_logs=(4 * channels, states),
        Ds=(4 * channels,),
    )
    arguments = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    parameters = draw(st.sampled_from(DTYPES))
    arguments = {name: value.to(device, dtype if name == 'x' else parameters) for name, value in arguments.items()}
    arguments = {name: lay_out(value, draw(st.sampled_from(LAYOUTS))) for name, value in arguments.items()}
    arguments['scan_mode'] = draw(st.sampled_from(('cross2d', 'unidi', 'bidi')))
    return {**arguments, 'backend': draw(backends(device, dtype, naive))}


# half precision rounds the projections, which exp(delta A) then amplifies
SS2D_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}


@cases(quick=40, full=600, arguments=ss2d_arguments())
def test_ss2d_scan_agrees_with_float64(arguments):
    out = ss2d_scan(**arguments)
    assert out.dtype == arguments['x'].dtype
    exact = {n: v.to(arguments['x'].dtype).double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    for name in ('dt_projs_bias', 'A_logs', 'Ds'):  # parameters of the state, which is float32
        exact[name] = arguments[name].double()
    expected = ss2d_scan(**{**exact, 'backend': 'naive'})
    limit = SS2D_LIMIT[out.dtype]
    assert ((out.double() - expected).norm() <= limit * expected.norm() + limit).item()


@cases(
    quick=40,
    full=400,
    arguments=ss2d_arguments(naive=False),
    which=st.integers(0, 5),
    place=st.integers(0, 10**6),
    value=st.sampled_from(SPOILS),
)
def test_nan_and_infinity_take_the_routes_of_ss2d_scan_and_no_others(arguments, which, place, value):
    spoil(arguments, which, place, value)
    out, expected = ss2d_scan(**arguments), ss2d_scan(**{**arguments, 'backend': 'naive'})
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite)
    error, size = ((value[finite].double()).norm() for value in (out - expected, expected))
    assert error <= SS2D_LIMIT[out.dtype] * (1 + size)


@cases(
    quick=40,
    full=400,
    arguments=ss2d_arguments(),
    fault=st.sampled_from(FAULTS),
    which=st.integers(0, 5),
    axis=st.integers(0, 3),
)
def test_ss2d_scan_refuses_one_broken_argument(arguments, fault, which, axis):
    name = list(arguments)[which]
    if fault == 'dtype' or (name == 'x' and fault == 'size' and axis != 1):
        fault = 'text'  # parameters of any dtype and maps of any size are right
    arguments[name] = broken(arguments[name], fault, axis)
    assert_refused(ss2d_scan, arguments)


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


def test_length_strategy_reaches_the_chunk():
    """The compiled scan works in chunks of 64 steps; lengths must lie on both sides of a chunk's end."""
    from hypothesis import find

    assert find(lengths(), lambda n: n > 64) and find(lengths(), lambda n: n == 64)
    assert np.isfinite(oracle(*(torch.ones(1, 1, 2),) * 2, -torch.ones(1, 1), *(torch.ones(1, 1, 1, 2),) * 2)[0]).all()
