"""Any arguments of ssd_scan give what its equation says, or one error that names the argument."""

import pytest
import torch
from hypothesis import strategies as st

from mmvmamba.ops import backend_report, ssd_scan
from tests.cases import cases
from tests.test_ops.op_inputs import DTYPES, FAULTS, LAYOUTS, ROUNDING, assert_refused, broken, lay_out, lengths
from tests.test_ops.ssd_inputs import draw_gradients, make_ssd_inputs, run_ssd, run_truth

COMPILED = {status.name: status for status in backend_report()}['cpu']
SIZES = st.sampled_from((None, None, (1, 1), (1, 7), (9, 8), (3, 23)))


@st.composite
def ssd_arguments(draw):
    """Valid arguments, and the options ``size`` and ``scan_mode``."""
    size, groups = draw(SIZES), draw(st.integers(1, 3))
    length = size[0] * size[1] if size else draw(lengths())
    routes, groups = (4, 4) if size else (1, groups)
    shape = dict(
        batch=draw(st.integers(1, 2)),
        length=length,
        heads=groups * draw(st.integers(1, 3)),
        channels=draw(st.integers(1, 5)),
        groups=groups,
        d_state=draw(st.sampled_from((1, 2, 5))),
        dtype=draw(st.sampled_from(DTYPES)),
        routes=routes,
        seed=draw(st.integers(0, 2**31)),
    )
    arguments = make_ssd_inputs(**shape)
    for name in ('D', 'dt_bias', 'initial_state'):
        if draw(st.booleans()):
            arguments[name] = None
    arguments['A'] = arguments['A'] * draw(st.sampled_from((1.0, 1.0, 0.0, 30.0)))
    layouts = st.sampled_from(LAYOUTS)
    arguments = {name: None if value is None else lay_out(value, draw(layouts)) for name, value in arguments.items()}
    options = dict(size=size, scan_mode=draw(st.sampled_from(('cross2d', 'unidi', 'bidi')))) if size else {}
    return arguments, options


@pytest.mark.skipif(not COMPILED.available, reason=COMPILED.reason)
@cases(quick=25, full=600, case=ssd_arguments())
def test_products_are_the_loop(case):
    arguments, options = case
    grads = draw_gradients(arguments)
    result, truth = run_ssd(arguments, *grads, **options), run_truth(arguments, *grads, **options)
    # sums may cancel to nothing: rounding is relative to the size of their terms, some of which decay before others
    signless = {n: None if v is None else v if n in ('dt', 'A', 'dt_bias') else v.abs() for n, v in arguments.items()}
    signless['A'] = signless['A'].clamp(min=-1)
    sizes = run_truth(signless, *(grad.abs() for grad in grads), **options)
    small = 1e-12 if arguments['x'].dtype == torch.float64 else 1e-5
    for name, expected in truth.items():
        value = result[name]
        error = (value.double() - expected).norm()
        limit = small * (sizes[name].norm() + expected.norm()) + ROUNDING[value.dtype] * expected.norm()
        assert error <= limit, f'{name}: error {error:.2e}, limit {limit:.2e}'


@cases(
    quick=30,
    full=400,
    case=ssd_arguments(),
    fault=st.sampled_from(FAULTS),
    which=st.integers(0, 7),
    axis=st.integers(0, 3),
)
def test_one_broken_argument_is_refused(case, fault, which, axis):
    arguments, options = case
    names = [name for name, value in arguments.items() if value is not None]
    name = names[which % len(names)]
    arguments[name] = broken(arguments[name], fault, axis)
    assert_refused(ssd_scan, {**arguments, **options}, names=(*arguments, 'size'))
