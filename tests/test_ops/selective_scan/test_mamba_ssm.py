"""Beside the ``selective_scan_fn`` of an installed mamba_ssm, as the published code tests its own scan.

Where there is none, the comparison itself is held to a recurrence of the same arguments.
"""

import importlib.util

import pytest
import torch

from tests.test_ops.scan_inputs import make_scan_inputs, relative_error, run_scan

if importlib.util.find_spec('mamba_ssm') is None:
    REASON = 'mamba_ssm is not installed'
else:
    REASON = '' if torch.cuda.is_available() else 'mamba_ssm computes on CUDA GPUs only, and torch sees none'
# the relative tolerances of the published tests
LIMITS = {torch.float32: 6e-4, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def run_theirs(scan, inputs, dout, delta_softplus):
    """What :func:`run_scan` gives, by another function of the same arguments."""
    leaves = {name: None if value is None else value.detach().requires_grad_() for name, value in inputs.items()}
    out, last_state = scan(**leaves, delta_softplus=delta_softplus, return_last_state=True)
    out.backward(dout.to(out.dtype))
    gradients = {'d' + name: value.grad for name, value in leaves.items() if value is not None}
    return dict(out=out.detach(), last_state=last_state.detach(), **gradients)


def compare(scan, device, dtype, d_state, length, groups, optional, delta_softplus):
    """Output, last state and every gradient."""
    inputs = make_scan_inputs(
        d_state=d_state, length=length, groups=groups, channels=8, dtype=dtype, device=device, optional=optional
    )
    if not delta_softplus:  # a step size is positive
        inputs['delta'], inputs['delta_bias'] = inputs['delta'].abs(), None
    dout = torch.randn(inputs['u'].shape).to(device, dtype)
    ours = run_scan(inputs, dout, delta_softplus=delta_softplus)
    theirs = run_theirs(scan, inputs, dout, delta_softplus)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = relative_error(ours[name], expected)
        assert error < LIMITS[dtype], f'{name}: relative difference {error:.2e}'


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize('dtype', LIMITS, ids=lambda dtype: str(dtype).removeprefix('torch.'))
@pytest.mark.parametrize('d_state, length', [(1, 49), (8, 130), (16, 64), (16, 1023), (64, 4096)])
@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('optional, delta_softplus', [(True, True), (False, True), (False, False)])
def test_scan(dtype, d_state, length, groups, optional, delta_softplus):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    compare(selective_scan_fn, 'cuda', dtype, d_state, length, groups, optional, delta_softplus)


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """The scan step by step, with the arguments of mamba_ssm's."""
    assert z is None and return_last_state
    step = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    step = torch.nn.functional.softplus(step) if delta_softplus else step
    B, C = (each.float().repeat_interleave(u.shape[1] // each.shape[1], dim=1) for each in (B, C))
    state, out = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        now = step[:, :, t, None]
        state = torch.exp(now * A) * state + now * B[..., t] * u[:, :, t, None].float()
        out.append((state * C[..., t]).sum(dim=-1))
    out = torch.stack(out, dim=-1)
    return (out if D is None else out + u.float() * D[:, None]).to(u.dtype), state


@pytest.mark.parametrize('dtype', LIMITS, ids=lambda dtype: str(dtype).removeprefix('torch.'))
@pytest.mark.parametrize('optional, delta_softplus', [(True, True), (False, True), (False, False)])
def test_the_comparison_accepts_the_recurrence(dtype, optional, delta_softplus):
    compare(recurrence, 'cpu', dtype, 8, 33, 2, optional, delta_softplus)


@pytest.mark.parametrize('wrong', ['out', 'last_state', 'gradient'])
def test_the_comparison_notices_what_is_wrong(wrong):
    def other(u, **arguments):
        out, state = recurrence(u + 0.01 * (u - u.detach()) if wrong == 'gradient' else u, **arguments)
        return (1.01 * out if wrong == 'out' else out), (1.01 * state if wrong == 'last_state' else state)

    with pytest.raises(AssertionError, match=f'{dict(gradient="du").get(wrong, wrong)}: relative difference'):
        compare(other, 'cpu', torch.float32, 4, 17, 1, True, True)
