"""A gate, B and C of other shapes, steps shared by channels, and states as output: beside the naive float64 truth."""

import functools

import pytest
import torch

from mmvmamba.ops import selective_scan
from mmvmamba.ops.selective_scan import naive
from tests.test_ops.scan_inputs import assert_scan_close, make_scan_inputs, relative_error, run_scan, run_truth

HAS_GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not HAS_GPU, reason='no CUDA GPU is visible to torch')
BACKENDS = ['cpu', pytest.param('cuda', marks=on_gpu), pytest.param('triton', marks=on_gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GROUPS, CHANNELS, STATES, LENGTH = 2, 6, 3, 131
FORMS = {
    'gate': dict(z=True),
    'one_group': dict(B='group', C='group'),
    'constant_B': dict(B='constant'),
    'constant_C': dict(C='constant', z=True),
    'both_constant': dict(B='constant', C='constant', shared=2),
    'one_group_beside_two': dict(B='group'),
    'shared_delta': dict(shared=3, z=True),
    'states': dict(C=None),
    'states_of_one_group': dict(B='group', C=None, shared=2),
    'states_by_a_constant': dict(B='constant', C=None),
}


def make_inputs(dtype, device='cpu', B='many', C='many', shared=1, z=False):
    """Arguments of ``selective_scan`` in the forms asked for."""
    inputs = make_scan_inputs(
        groups=GROUPS, channels=CHANNELS, d_state=STATES, length=LENGTH, dtype=dtype, device=device
    )
    for name, form in (('B', B), ('C', C)):
        if form == 'group':
            inputs[name] = inputs[name][:, 0].contiguous()
        elif form == 'constant':
            inputs[name] = inputs[name][0, 0, :, : GROUPS * CHANNELS].mT.to(inputs['A'].dtype).contiguous()
        elif form is None:
            inputs[name] = inputs['D'] = None
    inputs['delta'] = inputs['delta'][:, ::shared].contiguous()
    if z:
        inputs['z'] = inputs['u'].flip(2).contiguous()
    return inputs


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('form', FORMS)
def test_form(form, dtype, backend):
    inputs = make_inputs(dtype, 'cpu' if backend == 'cpu' else 'cuda', **FORMS[form])
    shape = inputs['u'].shape if inputs['C'] is not None else (*inputs['u'].shape[:2], STATES, LENGTH)
    dout = torch.randn(shape, device=inputs['u'].device).to(dtype)
    result = run_scan(inputs, dout, backend=backend)
    truth = run_truth(inputs, dout)
    assert result['out'].shape == truth['out'].shape and result['out'].dtype == dtype
    for name in ('dB', 'dC', 'ddelta', 'dz'):  # rounded for each channel, then added up
        if name in truth:
            assert relative_error(result.pop(name), truth.pop(name)) < {torch.float32: 5e-5}.get(dtype, 8e-3), name
    assert_scan_close(result, truth, dtype)


def test_the_truth_of_each_form_is_that_of_the_form_it_stands_for():
    inputs = make_inputs(torch.float64, B='group', C='constant', shared=2, z=True)
    batch, dim = inputs['u'].shape[:2]
    plain = dict(
        inputs,
        B=inputs['B'][:, None].expand(batch, dim, -1, -1),
        C=inputs['C'][None, ..., None].expand(batch, -1, -1, LENGTH),
        delta=torch.stack([inputs['delta']] * 2, 2).flatten(1, 2),
        z=None,
    )
    expected = run_scan(plain, backend='naive')['out'] * inputs['z'] * torch.sigmoid(inputs['z'])
    assert relative_error(run_scan(inputs, backend='naive')['out'], expected) < 1e-14
    states = run_scan(dict(inputs, C=None, D=None, z=None), backend='naive')['out']
    y = (states * plain['C']).sum(2) + inputs['D'][:, None] * inputs['u']
    assert relative_error(y * inputs['z'] * torch.sigmoid(inputs['z']), expected) < 1e-14


@pytest.mark.parametrize('optional, softplus', [(True, True), (False, False)])
def test_naive_backward_needs_no_autograd(optional, softplus):
    inputs = make_scan_inputs(d_state=STATES, length=19, dtype=torch.float64, optional=optional)
    dout = torch.randn_like(inputs['u'])
    truth = run_truth(inputs, dout, delta_softplus=softplus)
    with torch.no_grad():
        gradients = naive.selective_scan_backward(dout, **inputs, delta_softplus=softplus)
    for (name, value), gradient in zip(inputs.items(), gradients):
        if value is None:
            assert gradient.numel() == 0
        else:
            assert relative_error(gradient, truth['d' + name]) < 1e-13, name


def test_autocast_casts_what_moves_and_keeps_what_is_constant():
    inputs = make_inputs(torch.bfloat16, B='constant', z=True)
    mixed = {name: t.half() if name in ('A', 'B', 'D') else t for name, t in inputs.items()}
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = selective_scan(**mixed, delta_softplus=True)
    assert out.dtype == torch.bfloat16
    expected = run_truth({n: t.float() for n, t in mixed.items()})['out']
    assert relative_error(out, expected) < 5e-3


@pytest.mark.parametrize('form', ['gate', 'both_constant', 'states_of_one_group'])
def test_compiled(form):
    inputs = make_inputs(torch.float32, **FORMS[form])
    scan = functools.partial(selective_scan, delta_softplus=True)
    compiled = torch.compile(scan, backend='aot_eager', fullgraph=True)
    assert relative_error(compiled(**inputs), scan(**inputs)) < 1e-6


@pytest.mark.parametrize(
    'change, error, message',
    [
        (
            dict(delta=torch.ones(2, 5, LENGTH)),
            ValueError,
            'delta has 5 channels but u has 12, which 5 does not divide',
        ),
        (dict(B=torch.ones(2, 3, 9)), ValueError, r'B has shape \(2, 3, 9\), expected \(2, 3, 131\)'),
        (dict(C=torch.ones(11, 3)), ValueError, r'C has shape \(11, 3\), expected \(12, 3\)'),
        (dict(C=torch.ones(12, 4)), ValueError, r'C has shape \(12, 4\), expected 3 states as in B'),
        (dict(C=torch.ones(12, 3).half()), TypeError, 'C is float16, expected float32'),
        (dict(C=None), ValueError, 'D is given, but C is None; states as output go without D'),
        (dict(C=None, D=None, z=torch.ones(2, 12, LENGTH)), ValueError, 'z is given, but C is None'),
        (dict(z=torch.ones(2, 12, 4)), ValueError, r'z has shape \(2, 12, 4\), expected \(2, 12, 131\)'),
        (dict(z=[1.0]), TypeError, r'z must be a tensor of shape \(batch, dim, L\), got list'),
    ],
    ids=lambda value: '' if not isinstance(value, dict) else '-'.join(value),
)
def test_wrong_forms(change, error, message):
    with pytest.raises(error, match='selective_scan: ' + message):
        selective_scan(**{**make_inputs(torch.float32), **change})
