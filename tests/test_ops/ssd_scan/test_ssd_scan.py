"""The scan of Mamba-2 on CPU: the matrix products against the loop, and the op's registration."""

import numpy as np
import pytest
import torch

from mmvmamba.ops import BackendError, backend_report, cross_merge, cross_scan, ssd_scan, use_backend
from mmvmamba.ops.ssd_scan import chunked
from tests.test_ops.scan_inputs import relative_error
from tests.test_ops.ssd_inputs import assert_ssd_close, draw_gradients, make_ssd_inputs, run_ssd, run_truth

COMPILED = {status.name: status for status in backend_report()}['cpu']
needs_cpu = pytest.mark.skipif(not COMPILED.available, reason=f'no compiled CPU backend: {COMPILED.reason}')
BACKENDS = ['naive', pytest.param('cpu', marks=needs_cpu)]
OPS = torch.ops.mmvmamba


def ids(value):
    return str(value).replace('torch.', '')


@pytest.mark.parametrize('height', [1, 2, 3, 7, 56, 199, 1000, 4093, 1 << 20])
@pytest.mark.parametrize('units', [-2, 0, 2], ids=lambda units: f'{units} units of the last digit')
def test_the_float_division_of_the_triton_kernels_is_exact(height, units):
    """For every step of a map of 2^20 pixels, also with a reciprocal as far off as a GPU's may be."""
    steps = np.arange(1 << 20, dtype=np.int32)
    reciprocal = np.float32(1) / np.float32(height)
    reciprocal += np.float32(units) * np.spacing(reciprocal)
    columns = ((steps.astype(np.float32) + np.float32(0.5)) * reciprocal).astype(np.int32)
    assert np.array_equal(columns, steps // height)


@needs_cpu
@pytest.mark.parametrize('d_state, channels, length', [(16, 16, 151), (64, 32, 63), (128, 64, 65), (64, 16, 1)])
def test_products_against_the_loop(d_state, channels, length):
    inputs = make_ssd_inputs(batch=1, length=length, heads=2, channels=channels, groups=1, d_state=d_state)
    grads = draw_gradients(inputs)
    assert_ssd_close(run_ssd(inputs, *grads, backend='cpu'), run_truth(inputs, *grads))


@needs_cpu
@pytest.mark.parametrize(
    'dtype, limit', [(torch.float64, 1e-12), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=ids
)
@pytest.mark.parametrize('optional', [True, False], ids=['full', 'bare'])
def test_dtypes_and_optional_arguments(dtype, limit, optional):
    """Half precision is computed in float32, and rounded once: by half a unit of its last digit."""
    inputs = make_ssd_inputs(length=70, dtype=dtype, optional=optional, groups=1, heads=3)
    grads = draw_gradients(inputs)
    result, truth = run_ssd(inputs, *grads, backend='cpu'), run_truth(inputs, *grads)
    assert_ssd_close(result, truth, limit, limit)
    assert result['out'].dtype == dtype and result['last_state'].dtype != torch.float16
    if dtype == torch.float16:
        wide = run_ssd(inputs, *grads, backend='cpu', out_dtype=torch.float32)
        assert wide['out'].dtype == torch.float32 and relative_error(wide['out'], truth['out']) < 5e-6


@pytest.mark.parametrize('scan_mode', ['cross2d', 'unidi', 'bidi'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_routes_of_a_map_are_those_of_cross_scan(scan_mode, backend):
    size, routes, heads, channels = (5, 7), 4, 2, 3
    inputs = make_ssd_inputs(
        length=35, heads=8, channels=channels, groups=4, routes=routes, optional=False, dtype=torch.float64
    )
    grads = draw_gradients(inputs)
    result = run_ssd(inputs, *grads, backend=backend, size=size, scan_mode=scan_mode)
    assert_ssd_close(result, run_truth(inputs, *grads, size=size, scan_mode=scan_mode), 1e-12, 1e-11)

    def along(value):  # what is the same for all routes, (B, L, ...) to (B, L, K * ...)
        shape = value.shape[2:]
        routed = cross_scan(value.flatten(2).unflatten(1, size), scan_mode, channel_last=True)
        return routed.unflatten(3, shape).flatten(2, 3)

    one = {
        name: value[:, :, : value.shape[2] // routes] if name in ('dt', 'B', 'C') else value
        for name, value in inputs.items()
    }
    of_one = {
        **one,
        **{name: one[name].repeat(1, 1, routes, *(1,) * (one[name].dim() - 3)) for name in ('dt', 'B', 'C')},
    }
    out = ssd_scan(**of_one, dt_softplus=True, size=size, scan_mode=scan_mode, backend=backend)
    sequences = {
        **one,
        **{name: along(one[name].view(*one[name].shape[:2], -1) if name == 'dt' else one[name]) for name in 'xBC'},
    }
    sequences['dt'] = along(one['dt'].unsqueeze(-1)).squeeze(-1)
    ys = ssd_scan(**sequences, dt_softplus=True, backend=backend)
    merged = cross_merge(ys.flatten(2).unflatten(2, (routes, heads * channels)), size, scan_mode, channel_last=True)
    torch.testing.assert_close(out.flatten(2).unflatten(1, size), merged)


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_state_continues_the_scan(backend):
    inputs = make_ssd_inputs(length=90, dtype=torch.float64)
    whole, last = ssd_scan(**inputs, dt_softplus=True, return_last_state=True, backend=backend)
    head, tail = (
        {k: v[:, part] if k in ('x', 'dt', 'B', 'C') else v for k, v in inputs.items()}
        for part in (slice(70), slice(70, None))
    )
    first, state = ssd_scan(**head, dt_softplus=True, return_last_state=True, backend=backend)
    second, end = ssd_scan(
        **{**tail, 'initial_state': state}, dt_softplus=True, return_last_state=True, backend=backend
    )
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


@needs_cpu
def test_long_decays_are_exact_in_float32():
    """Steps whose decay is nothing stand beside steps that keep everything: sums of dt A lose no digits."""
    inputs = make_ssd_inputs(length=64, heads=2, groups=1)
    inputs['A'] = -torch.tensor([50.0, 1e-3])
    inputs['dt'][:, ::5] = 8.0
    inputs['dt'][:, 1::5] = -12.0
    grads = draw_gradients(inputs)
    assert_ssd_close(run_ssd(inputs, *grads, backend='cpu'), run_truth(inputs, *grads))


@needs_cpu
def test_same_bits_for_any_number_of_threads():
    inputs = make_ssd_inputs(length=130, heads=6)
    grads = draw_gradients(inputs)
    first = run_ssd(inputs, *grads, backend='cpu')
    torch.set_num_threads(1)
    second = run_ssd(inputs, *grads, backend='cpu')
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_cpu
@pytest.mark.parametrize('size', [None, (5, 7)], ids=str)
@pytest.mark.parametrize('optional', [True, False], ids=['full', 'bare'])
def test_opcheck(size, optional):
    routes = 4 if size else 1
    inputs = make_ssd_inputs(batch=1, length=35, heads=8, groups=4, routes=routes, optional=optional)
    values = [None if value is None else value.requires_grad_() for value in inputs.values()]
    place = (*size, 0) if size else (0, 0, -1)
    torch.library.opcheck(OPS.ssd_scan.default, (*values, True, False, True, *place))
    values = [None if value is None else value.detach() for value in values]
    torch.library.opcheck(OPS.ssd_scan_backward.default, (*draw_gradients(inputs), *values, True, *place))


@needs_cpu
def test_compile_is_one_graph_of_any_size():
    torch._dynamo.reset()

    def core(size, **inputs):
        return ssd_scan(**inputs, dt_softplus=True, size=size).cos()

    compiled = torch.compile(core, fullgraph=True, backend='aot_eager', dynamic=True)
    for size in [(5, 7), (6, 9)]:
        inputs = make_ssd_inputs(length=size[0] * size[1], heads=8, groups=4, routes=4)
        leaves = [value.requires_grad_() for value in inputs.values()]
        out, expected = compiled(size, **inputs), core(size, **inputs)
        torch.testing.assert_close(out, expected)
        for grad, value in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (out, expected))):
            torch.testing.assert_close(grad, value, rtol=1e-4, atol=1e-5)


@needs_cpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=ids)
def test_autocast_promotes_the_inputs(dtype):
    inputs = make_ssd_inputs(length=20)
    half = {**inputs, 'x': inputs['x'].to(dtype), 'B': inputs['B'].to(dtype), 'D': inputs['D'].to(dtype)}
    with pytest.raises(TypeError, match='outside autocast'):
        ssd_scan(**half)
    with torch.autocast('cpu', dtype):
        out = ssd_scan(**half, dt_softplus=True)
        direct, _ = OPS.ssd_scan(*half.values(), True, True, False, 0, 0, -1)
    expected = ssd_scan(**{name: value.float() for name, value in half.items()}, dt_softplus=True)
    assert torch.equal(out, expected) and torch.equal(direct, expected)


def test_meta_tensors_give_the_shapes():
    inputs = {name: value.to('meta') for name, value in make_ssd_inputs(length=12, heads=8, groups=4, routes=4).items()}
    out, state = ssd_scan(**inputs, size=(3, 4), return_last_state=True)
    assert out.is_meta and out.shape == (2, 12, 2, 8) and state.shape == (2, 8, 8, 4)


ROUTED = dict(length=12, heads=8, groups=4, routes=4)


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(x=None), TypeError, 'x must be a tensor of shape'),
        (dict(dt=torch.ones(2, 12, 3)), ValueError, r'dt has shape .* expected \(2, 12, 8\)'),
        (dict(A=torch.ones(3)), ValueError, r'A has shape \(3,\), expected \(8,\)'),
        (dict(A=torch.ones(8).double()), TypeError, 'A is float64, expected float32'),
        (dict(B=torch.ones(2, 12, 2, 4)), ValueError, r'B has shape .* expected \(2, 12, 4, 4\)'),
        (dict(C=torch.ones(2, 12, 4, 5)), ValueError, r'C has shape .*the shape of B'),
        (dict(C=torch.ones(2, 12, 4, 4).half()), TypeError, 'C is float16, but x is float32'),
        (dict(D=torch.ones(8)), ValueError, r'D must have the dimensions \(H, P\)'),
        (dict(dt_bias=torch.ones(2)), ValueError, r'dt_bias has shape \(2,\), expected \(8,\)'),
        (dict(initial_state=torch.ones(2, 8, 8, 5)), ValueError, r'initial_state has shape'),
        (dict(dt_softplus=1), TypeError, 'dt_softplus is 1, expected True or False'),
        (dict(return_last_state='no'), TypeError, "return_last_state is 'no'"),
        (dict(size=(3, 5)), ValueError, r'size is \(3, 5\), expected a map of the 12 steps of x'),
        (dict(size=12), ValueError, r'size is 12, expected \(H, W\)'),
        (dict(scan_mode='spiral'), ValueError, "scan_mode is 'spiral'"),
        (dict(scan_mode='cascade2d'), ValueError, "scan_mode is 'cascade2d', expected cross2d, unidi or bidi"),
        (dict(out_dtype=torch.float16), ValueError, 'out_dtype is float16'),
        (dict(backend='gpu'), ValueError, "backend is 'gpu'"),
        (
            dict(backend='cuda'),
            BackendError,
            "ssd_scan: there is no backend 'cuda', expected one of naive, cpu, triton",
        ),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else '',
)
def test_errors_name_the_argument(change, error, message):
    arguments = {**make_ssd_inputs(**ROUTED), 'size': (3, 4), **change}
    with pytest.raises(
        error, match=f'ssd_scan: .*{message}' if error is not BackendError and 'backend' not in change else message
    ):
        ssd_scan(**arguments)


def test_groups_divide_the_heads_and_states_are_few():
    with pytest.raises(ValueError, match='B has 3 groups but dt has 4 heads'):
        ssd_scan(**make_ssd_inputs(groups=3))
    with pytest.raises(ValueError, match=r'B has 257 states \(N\), at most 256'):
        ssd_scan(**make_ssd_inputs(length=2, d_state=257))


@needs_cpu
def test_a_choice_for_all_ops_that_it_lacks_leaves_the_choice(monkeypatch):
    from mmvmamba.ops import backend

    inputs = make_ssd_inputs(length=5)
    with use_backend('naive', ops=['ssd_scan']):
        naive = ssd_scan(**inputs)
    monkeypatch.setattr(backend, '_check_can_run', lambda *_: None)
    token = backend._requested.set({None: 'cuda'})
    try:
        assert backend.resolve('ssd_scan', 'cpu') == 'cpu' and backend.resolve('ss2d_scan', 'cpu') == 'cuda'
        torch.testing.assert_close(ssd_scan(**inputs), naive)
    finally:
        backend._requested.reset(token)


def test_states_carried_at_once_are_those_of_the_loop():
    """A chunk that leaves nothing of the state before it, others that leave it whole, and growth."""
    states, first = torch.randn(2, 5, 2, 3, 4, 6).double(), torch.randn(2, 2, 3, 4, 6).double()
    log_total = 3 * torch.randn(2, 5, 2, 3, 1, 1, dtype=torch.float64)
    log_total[:, 1], log_total[:, 3] = -1e4, 0.0
    for found, expected in zip(
        chunked.carry_at_once(states, log_total, first), chunked.carry(states, log_total, first)
    ):
        torch.testing.assert_close(found, expected)
