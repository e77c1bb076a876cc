"""Extreme numbers: what stays finite, what does not, and that the state is float32 whatever the input.

On the CPU, and on a GPU where there is one.
"""

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from mmvmamba.ops import backend_report, selective_scan
from tests.test_ops.oracle import oracle
from tests.test_ops.scan_inputs import ROUNDING, relative_error

HALF = (torch.float16, torch.bfloat16)
COMPILED = [
    (kind, status.name) for status in backend_report() if status.available for kind in status.devices if kind != 'any'
]


@pytest.fixture(params=('cpu', 'cuda') if torch.cuda.is_available() else ('cpu',))
def device(request):
    return request.param


def inputs(length, device, dtype=torch.float32, u=1.0, delta=1.0, A=-1.0, B=1.0, C=1.0):
    """Constant arguments for one channel and one state."""
    full = lambda value, *shape, kind=dtype: torch.full(shape, float(value), dtype=kind, device=device)  # noqa: E731
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        u=full(u, 1, 1, length),
        delta=full(delta, 1, 1, length),
        A=full(A, 1, 1, kind=state),
        B=full(B, 1, 1, 1, length),
        C=full(C, 1, 1, 1, length),
    )


def run(arguments, **options):
    """Output and all gradients of its sum."""
    leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    out = selective_scan(**leaves, **options)
    out.sum().backward()
    return out.detach(), {name: value.grad for name, value in leaves.items()}


@pytest.mark.parametrize('device, backend', COMPILED)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('delta', [1e-8, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize('A', [-1e-30, -1e-4, -1.0, -1e4, -3e38])
def test_any_step_and_decay_is_finite_and_right(device, backend, dtype, delta, A):
    """A near 0 never forgets, A very negative forgets at once; both for steps up to 1e3 and in every dtype."""
    arguments = inputs(130, device, dtype, delta=delta, A=A)
    if dtype == torch.float64 and device != 'cpu':
        backend = 'naive'  # the others have no float64
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out, gradients = run(arguments, out_dtype=out_dtype, backend=backend)
    expected, *_ = oracle(**arguments)
    assert relative_error(out, torch.from_numpy(expected)) < 2e-5
    _, exact = run({name: value.double() for name, value in arguments.items()}, backend='naive')
    for name, value in gradients.items():  # one in half precision is infinite beyond 65504
        representable = exact[name].abs() <= torch.finfo(value.dtype).max
        limit = 5e-5 + ROUNDING[value.dtype]
        if backend == 'triton' and name == 'A' and delta * A > -80:  # rounds the state, not what decay leaves of it
            limit += 4 * ROUNDING[torch.float32] / np.exp(delta * A)
        assert relative_error(value[representable], exact[name][representable]) < limit, name


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize('sign', [1, -1])
def test_largest_input(device, dtype, sign):
    """|u| up to the dtype's maximum: finite while the sum of |delta B u| is a float32, that is 3.4e38."""
    largest = torch.finfo(dtype).max
    delta = 1.0 if dtype == torch.float16 else 0.4  # the state goes to u * delta / (1 - exp(-delta))
    C = 1.0 if dtype == torch.float16 else 2.0**-2
    arguments = inputs(100, device, dtype, u=sign * largest, delta=delta, C=C)
    out, gradients = run(arguments, out_dtype=torch.float32)
    expected, size, _ = oracle(**arguments)
    assert size.max() < 3.4e38 or not np.isfinite(size).all()
    finite = np.isfinite(size)
    out = out.cpu()
    assert out.isfinite().numpy()[finite].all()
    assert relative_error(out[torch.from_numpy(finite)], torch.from_numpy(expected[finite])) < 2e-5
    assert gradients['u'].isfinite().all()


def test_the_state_is_float32_for_half_inputs(device):
    """A sum of 1000 fp16 inputs of 60000 is beyond fp16; the state holds it, and C brings it back into range."""
    arguments = inputs(1000, device, torch.float16, u=60000, delta=1.0, A=-1e-6, C=2.0**-14)
    out, last = selective_scan(**arguments, return_last_state=True)
    assert last.dtype == torch.float32 and 5e7 < last.item() < 6.1e7
    assert out.dtype == torch.float16 and abs(out[0, 0, -1].item() - last.item() * 2.0**-14) < 2


def test_beyond_the_range_is_infinite_not_wrong(device):
    """A growing state leaves float32, an output leaves fp16: infinity, never a large number in its place."""
    out = selective_scan(**inputs(8, device, A=50.0))
    assert out[0, 0, 0] == 1 and not out[0, 0, 2:].isfinite().any()
    assert selective_scan(**inputs(3, device, torch.float16, u=60000, C=60000)).isinf().all()


def test_below_the_range_is_zero_and_stays_zero(device):
    """A drive of 1e-60 is no float32: however a growing state amplifies it later, it is not there. Float64 holds it.

    All decays together are within float32, which on a GPU they must be.
    """
    for dtype, expected in ((torch.float32, 0.0), (torch.float64, 1e-60 * np.exp(40 * 2.0))):
        out = selective_scan(**inputs(41, device, dtype, u=1e-30, A=2.0, B=1e-30))
        assert out[0, 0, -1].item() == pytest.approx(expected * 1.15651764, rel=1e-6, abs=0)


@pytest.mark.parametrize('delta', [-1e30, -3e38, float('-inf')])
def test_a_closed_step_adds_nothing(device, delta):
    """softplus of a very negative step is 0: the state stays as it is."""
    arguments = inputs(3, device)
    arguments['delta'][0, 0, 1] = delta
    out = selective_scan(**arguments, delta_softplus=True)
    assert out.isfinite().all() and out[0, 0, 0] == out[0, 0, 1]


@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=str)
def test_a_million_steps(device, dtype):
    """Against a linear filter in float64: forward, and the gradient of u, which is the filter run backwards."""
    length, delta, A = 1_000_000, 0.01, -0.5
    generator = torch.Generator().manual_seed(0)
    arguments = inputs(length, device, dtype, delta=delta, A=A)
    arguments['u'] = torch.randn(1, 1, length, generator=generator).to(device, dtype)
    out, gradients = run(arguments, out_dtype=torch.float32)
    step = float(arguments['delta'][0, 0, 0])
    decay = np.exp(step * A)
    expected = lfilter([step], [1, -decay], arguments['u'].double().cpu().numpy()[0, 0])
    # the decay is rounded once to float32, a GPU's to two units in the last place; it counts for 1 / (1 - decay) steps
    limit = (2 if device == 'cpu' else 8) * 2.0**-24 / (1 - decay)
    assert relative_error(out[0, 0], torch.from_numpy(expected)) < limit
    du = lfilter([step], [1, -decay], np.ones(length))[::-1].copy()
    rounding = {torch.float32: 0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert relative_error(gradients['u'][0, 0], torch.from_numpy(du)) < limit + rounding
    assert all(value.isfinite().all() for value in gradients.values())
