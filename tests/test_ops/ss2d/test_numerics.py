"""Extreme numbers in the SS2D core: what stays finite, what does not, on the CPU and on a GPU where there is one."""

import pytest
import torch

from mmvmamba.ops import ss2d_scan
from tests.test_ops.scan_inputs import relative_error
from tests.test_ops.selective_scan.test_numerics import COMPILED, HALF

ROUTES, CHANNELS, RANK, HEIGHT, WIDTH = 4, 6, 2, 5, 7


def ss2d_inputs(device, dtype, largest, bias, A_log, states=1):
    """Arguments of ``ss2d_scan`` with |x| up to ``largest`` and projections of the size of 1, and the exact output."""
    generator = torch.Generator().manual_seed(0)
    x, x_proj, dt_projs = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, CHANNELS, HEIGHT, WIDTH), (ROUTES, RANK + 2 * states, CHANNELS), (ROUTES, CHANNELS, RANK))
    )
    arguments = dict(
        x=(x / x.abs().max() * largest).to(dtype),
        x_proj_weight=(x_proj / largest).to(dtype),
        dt_projs_weight=dt_projs.to(dtype),
        dt_projs_bias=torch.full((ROUTES, CHANNELS), bias),
        A_logs=torch.full((ROUTES * CHANNELS, states), A_log),
        Ds=torch.full((ROUTES * CHANNELS,), 0.2),
    )
    expected = ss2d_scan(**{name: value.double() for name, value in arguments.items()}, backend='naive')
    return {name: value.to(device) for name, value in arguments.items()}, expected


@pytest.mark.parametrize('device, backend', COMPILED)
@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize('bias', [-1e3, -30.0, 0.0, 1e3])
@pytest.mark.parametrize('A_log', [-70.0, 0.0, 80.0])
@pytest.mark.parametrize('states', [1, 3])
def test_ss2d_scan_is_finite_and_right_in_its_range(device, backend, dtype, bias, A_log, states):
    """Steps from 0 to 1000, states that never forget or at once, |x| as large as the sum of |delta B x| may be."""
    largest = torch.finfo(dtype).max if bias < 0 else min(torch.finfo(dtype).max, 1e32)
    arguments, expected = ss2d_inputs(device, dtype, largest, bias, A_log, states)
    out = ss2d_scan(**arguments, out_dtype=torch.float32, backend=backend)
    assert out.isfinite().all()
    assert relative_error(out, expected) < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize('device, backend', COMPILED)
@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize('bias', [-1e3, 1e3])
@pytest.mark.parametrize('A_log', [-70.0, 80.0])
@pytest.mark.parametrize('states', [1, 3])
def test_ss2d_scan_has_right_gradients_at_any_step_and_decay(device, backend, dtype, bias, A_log, states):
    """What a state keeps of the step before is multiplied by A, 5e34 here: 0 must be 0 and no rounding error."""
    arguments, out = ss2d_inputs(device, dtype, 1.0, bias, A_log, states)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    gradients = []
    for precision in ({}, dict(dtype=torch.float64)):
        leaves = {name: value.detach().to(**precision).requires_grad_() for name, value in arguments.items()}
        options = dict(backend='naive') if precision else dict(backend=backend, out_dtype=torch.float32)
        out = ss2d_scan(**leaves, **options)
        (out * weights.to(out)).mean().backward()
        gradients.append({name: value.grad for name, value in leaves.items()})
    value, expected = gradients
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for name in arguments:
        assert relative_error(value[name], expected[name]) < limit, name


@pytest.mark.parametrize('device, backend', COMPILED)
@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=str)
def test_ss2d_scan_beyond_the_range_is_not_finite_or_right(device, backend, dtype):
    """A state or an output that leaves its dtype is infinite, or NaN where routes meet; never a number in its place."""
    arguments, expected = ss2d_inputs(device, dtype, min(torch.finfo(dtype).max, 1e35), 1e3, -70.0)
    out = ss2d_scan(**arguments, backend=backend).cpu()
    finite, slack = out.isfinite(), 2e-2 * expected.abs().max()
    beyond = expected.abs() > torch.finfo(dtype).max + slack
    assert beyond.any() and not finite[beyond].any()
    assert ((out.double() - expected).abs()[finite] <= slack).all()


@pytest.mark.parametrize('device, backend', COMPILED)
@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize('rank', [RANK, 20])
@pytest.mark.parametrize('states', [1, 3])
def test_ss2d_scan_closes_steps_by_infinite_weights(device, backend, dtype, rank, states):
    """Steps of softplus(-inf) = 0 leave D x alone, also where a kernel's segments reach beyond the image."""
    x = -torch.arange(1.0, 1 + CHANNELS * HEIGHT * WIDTH).view(1, CHANNELS, HEIGHT, WIDTH) / 200
    arguments = dict(
        x=x.to(dtype),
        x_proj_weight=torch.ones(ROUTES, rank + 2 * states, CHANNELS, dtype=dtype),
        dt_projs_weight=torch.full((ROUTES, CHANNELS, rank), float('inf'), dtype=dtype),
        dt_projs_bias=torch.zeros(ROUTES, CHANNELS),
        A_logs=torch.zeros(ROUTES * CHANNELS, states),
        Ds=torch.full((ROUTES * CHANNELS,), 0.25),
    )
    arguments = {name: value.to(device) for name, value in arguments.items()}
    out = ss2d_scan(**arguments, out_dtype=torch.float32, backend=backend)
    assert torch.equal(out, arguments['x'].float())
