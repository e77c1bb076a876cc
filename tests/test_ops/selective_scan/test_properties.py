"""Any arguments of selective_scan give the right result, or one error that names the argument."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from mmvmamba.ops import selective_scan
from tests.cases import cases
from tests.test_ops.op_inputs import (
    FAULTS,
    ROUNDING,
    SPOILS,
    assert_refused,
    broken,
    lengths,
    scan_arguments,
    spoil,
)
from tests.test_ops.oracle import oracle
from tests.test_ops.scan_inputs import GRADIENT_LIMIT, assert_scan_close, run_scan, run_truth


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


def test_length_strategy_reaches_the_chunk():
    """The compiled scan works in chunks of 64 steps; lengths must lie on both sides of a chunk's end."""
    from hypothesis import find

    assert find(lengths(), lambda n: n > 64) and find(lengths(), lambda n: n == 64)
    assert np.isfinite(oracle(*(torch.ones(1, 1, 2),) * 2, -torch.ones(1, 1), *(torch.ones(1, 1, 1, 2),) * 2)[0]).all()
