"""The selective scan on CPU: both backends against the published numbers, and the compiled one against the naive."""

import json

import pytest
import torch

from mmvmamba.ops import backend_report, selective_scan
from tests.test_ops.scan_inputs import (
    assert_scan_close,
    make_scan_inputs,
    relative_error,
    run_scan,
    run_truth,
)

COMPILED = {status.name: status for status in backend_report()}['cpu']
needs_cpu = pytest.mark.skipif(not COMPILED.available, reason=f'no compiled CPU backend: {COMPILED.reason}')
BACKENDS = ['naive', pytest.param('cpu', marks=needs_cpu)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REFERENCE_CASES = [
    'n1_l1',
    'n1_l49',
    'n1_l196',
    'n16_l49',
    'n2_l49_noD',
    'n8_l196_k2',
    'n1_l7_bare',
    'n8_l49_nosoftplus',
]


def ids(value):
    return str(value).replace('torch.', '')


@pytest.mark.parametrize('name', ['delta_softplus', 'return_last_state', 'check_finite'])
@pytest.mark.parametrize('value', ['no', 1, None], ids=str)
def test_a_switch_is_true_or_false(name, value):
    with pytest.raises(TypeError, match=rf'selective_scan: {name} is {value!r}, expected True or False'):
        selective_scan(**make_scan_inputs(length=2), **{name: value})


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=ids)
def test_meta_tensors_give_the_shapes(dtype):
    inputs = make_scan_inputs(d_state=2, length=5, dtype=dtype, device='meta')
    out, state = selective_scan(**inputs, out_dtype=torch.float32, return_last_state=True, check_finite=True)
    assert out.is_meta and out.shape == inputs['u'].shape and out.dtype == torch.float32
    assert state.is_meta and state.shape == (2, 6, 2) and state.dtype == torch.float32
    with pytest.raises(ValueError, match=r'A has shape'):
        selective_scan(**{**inputs, 'A': inputs['A'][:2]})


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=ids)
@pytest.mark.parametrize('case', REFERENCE_CASES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_published_numbers(backend, case, dtype, op_reference):
    manifest = json.loads(bytes(op_reference['manifest_json']))
    prefix = f'scan/{case}/in/'
    inputs = {
        key.removeprefix(prefix): torch.from_numpy(value).to(dtype)
        for key, value in op_reference.items()
        if key.startswith(prefix)
    }
    dout = inputs.pop('dout')
    result = run_scan(inputs, dout, delta_softplus=manifest[case]['softplus'], backend=backend)
    prefix = f'scan/{case}/ref/'
    expected = {key.removeprefix(prefix): value for key, value in op_reference.items() if key.startswith(prefix)}
    assert expected.keys() == result.keys()
    for name, value in expected.items():
        assert relative_error(result[name], torch.from_numpy(value)) < 5e-6, name


@pytest.mark.parametrize('backend', BACKENDS)
def test_softplus_is_exact_to_float64(backend):
    """PyTorch's own, by its default, is its argument from 20 on, and so wrong by 2e-9."""
    delta = torch.linspace(-40, 60, 1001, dtype=torch.float64).view(1, -1, 1)
    ones = torch.ones_like(delta)
    zero, one = torch.zeros(1001, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    out = selective_scan(ones, delta, zero, one, one, delta_softplus=True, backend=backend)
    expected = torch.logaddexp(delta, torch.zeros_like(delta))
    assert ((out - expected) / expected).abs().max() < 1e-14


@needs_cpu
@pytest.mark.parametrize('dtype', DTYPES, ids=ids)
@pytest.mark.parametrize('length', [1, 7, 63, 196, 1000])
@pytest.mark.parametrize('d_state', [1, 2, 8, 16])
def test_compiled_against_naive(d_state, length, dtype):
    inputs = make_scan_inputs(d_state=d_state, length=length, dtype=dtype)
    dout = torch.randn_like(inputs['u'])
    truth = run_truth(inputs, dout)
    assert_scan_close(run_scan(inputs, dout, backend='cpu'), truth, dtype)


@needs_cpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=ids)
def test_float_output_of_half_inputs(dtype):
    inputs = make_scan_inputs(d_state=2, length=100, dtype=dtype)
    dout = torch.randn(inputs['u'].shape)
    for backend in ('naive', 'cpu'):
        result = run_scan(inputs, dout, out_dtype=torch.float32, backend=backend)
        assert result['out'].dtype == torch.float32
        assert_scan_close(result, run_truth(inputs, dout), dtype)


@needs_cpu
@pytest.mark.parametrize('groups, channels', [(1, 1), (4, 1), (1, 37), (3, 5)])
@pytest.mark.parametrize('optional', [True, False], ids=['full', 'bare'])
def test_groups_and_optional_arguments(groups, channels, optional):
    inputs = make_scan_inputs(groups=groups, channels=channels, d_state=2, length=70, optional=optional)
    if not optional:
        inputs['delta'] = inputs['delta'].abs()  # a negative step without softplus grows without bound
    dout = torch.randn_like(inputs['u'])
    result = run_scan(inputs, dout, delta_softplus=optional, backend='cpu')
    assert_scan_close(result, run_truth(inputs, dout, delta_softplus=optional), torch.float32)


@needs_cpu
def test_largest_state():
    inputs = make_scan_inputs(batch=1, d_state=256, length=9)
    dout = torch.randn_like(inputs['u'])
    assert_scan_close(run_scan(inputs, dout, backend='cpu'), run_truth(inputs, dout), torch.float32)


def strided(tensor):
    """The same values in memory that is neither contiguous nor dense."""
    order = list(range(tensor.dim()))[::-1]
    wide = torch.empty([2 * size for size in reversed(tensor.shape)], dtype=tensor.dtype, device=tensor.device)
    view = wide[tuple(slice(None, None, 2) for _ in order)].permute(order)
    return view.copy_(tensor)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('names', [('u',), ('delta',), ('A',), ('B', 'C'), ('u', 'delta', 'A', 'B', 'C', 'D')], ids=ids)
def test_strides(names, backend):
    inputs = make_scan_inputs(d_state=3, length=65)
    dout = torch.randn_like(inputs['u'])
    truth = run_truth(inputs, dout)
    views = {name: strided(value) if name in names else value for name, value in inputs.items()}
    assert not any(views[name].is_contiguous() for name in names)
    assert_scan_close(run_scan(views, strided(dout), backend=backend), truth, torch.float32)


@pytest.mark.parametrize('backend', BACKENDS)
def test_expanded_gradient(backend):
    inputs = make_scan_inputs(d_state=2, length=20)
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    selective_scan(**leaves, delta_softplus=True, backend=backend).sum().backward()  # its gradient has stride 0
    truth = run_truth(inputs, torch.ones_like(inputs['u']))
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, truth['d' + name]) < 5e-5, name


@pytest.mark.parametrize('d_state', [1, 3])
@pytest.mark.parametrize('optional', [True, False], ids=['full', 'bare'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_gradcheck(backend, optional, d_state):
    inputs = make_scan_inputs(batch=1, channels=2, d_state=d_state, length=6, dtype=torch.float64, optional=optional)
    present = {name: value.requires_grad_() for name, value in inputs.items() if value is not None}

    def scan(*values):
        return selective_scan(**dict(zip(present, values)), delta_softplus=optional, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(present.values()))


@needs_cpu
def test_gradient_of_the_gradient_is_refused():
    inputs = {name: value.requires_grad_() for name, value in make_scan_inputs(length=5).items()}
    out = selective_scan(**inputs, backend='cpu')
    (du,) = torch.autograd.grad(out.sum(), inputs['u'], create_graph=True)
    with pytest.raises(RuntimeError, match=r'selective_scan.*second.*naive'):
        du.sum().backward()


@pytest.mark.parametrize('backend', BACKENDS)
def test_last_state_continues_the_scan(backend):
    """y of a whole sequence is that of its parts, when the first part's state enters through C's decay."""
    inputs = make_scan_inputs(d_state=2, length=130, dtype=torch.float64)
    whole, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend=backend)
    cut = 77
    part = {k: v[..., :cut] if k in ('u', 'delta', 'B', 'C') else v for k, v in inputs.items()}
    head, state = selective_scan(**part, delta_softplus=True, return_last_state=True, backend=backend)
    torch.testing.assert_close(head, whole[..., :cut])
    for t in range(cut, 130):
        dt = torch.nn.functional.softplus(inputs['delta'][..., t] + inputs['delta_bias'])
        B = inputs['B'][..., t].repeat_interleave(3, dim=1)
        state = torch.exp(dt[..., None] * inputs['A']) * state + (dt * inputs['u'][..., t])[..., None] * B
    torch.testing.assert_close(state, last)


@needs_cpu
def test_same_bits_for_any_number_of_threads():
    inputs = make_scan_inputs(groups=2, channels=70, d_state=2, length=300)
    dout = torch.randn_like(inputs['u'])
    first = run_scan(inputs, dout, backend='cpu')
    torch.set_num_threads(1)
    for _ in range(2):
        second = run_scan(inputs, dout, backend='cpu')
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=ids)
def test_large_values_stay_finite(dtype, backend):
    inputs = make_scan_inputs(d_state=2, length=200, dtype=dtype)
    inputs['u'] = inputs['u'] * 1e3
    inputs['delta'] = (inputs['delta'] * 1e4).clamp(-50, 50)
    dout = torch.randn(inputs['u'].shape)
    result = run_scan(inputs, dout, out_dtype=torch.float32, backend=backend)
    assert all(value.isfinite().all() for name, value in result.items() if value.dtype == torch.float32)


@pytest.mark.parametrize('backend', BACKENDS)
def test_nan_is_passed_on(backend):
    inputs = make_scan_inputs(length=20)
    inputs['u'][0, 1, 7] = float('nan')
    out = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert out[0, 1, 7:].isnan().all() and out[0, 1, :7].isfinite().all() and out[1].isfinite().all()
