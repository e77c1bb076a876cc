"""Any arguments of ss2d_scan give the right result, or one error that names the argument."""

import torch
from hypothesis import strategies as st

from mmvmamba.ops import ss2d_scan
from tests.cases import cases
from tests.test_ops.op_inputs import (
    DEVICES,
    DTYPES,
    FAULTS,
    LAYOUTS,
    SPOILS,
    assert_refused,
    backends,
    broken,
    lay_out,
    spoil,
)


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
