"""The causal convolution: its Python function, and the compiled module in four argument lists."""

import pytest
import torch
import torch.nn.functional as F

from tests.test_ops.scan_inputs import relative_error

LIMIT = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-13}
DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU'))]
pytestmark = [pytest.mark.usefixtures('names'), pytest.mark.parametrize('device', DEVICES)]
BATCH, DIM, WIDTH = 2, 5, 4


def make_inputs(dtype, device, length, bias=True):
    shapes = dict(x=(BATCH, DIM, length), weight=(DIM, WIDTH), bias=(DIM,), before=(BATCH, DIM, WIDTH - 1))
    values = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    return [*(values[name] for name in ('x', 'weight')), values['bias'] if bias else None, values['before']]


def truth(x, weight, bias, before, dout, silu, dfinal=None):
    """Output, last steps and gradients in float64, a step after the other."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, before)]
    x, weight, bias, before = leaves
    padded = torch.cat((x.new_zeros(BATCH, DIM, WIDTH - 1) if before is None else before, x), 2)
    steps = [(padded[..., t : t + WIDTH] * weight).sum(-1) for t in range(x.shape[2])]
    y = torch.stack(steps, 2) + (0 if bias is None else bias[:, None])
    out, final = F.silu(y) if silu else y, padded[..., padded.shape[2] - WIDTH + 1 :]
    total = (out * dout.double()).sum() + (0 if dfinal is None else (final * dfinal.double()).sum())
    grads = iter(torch.autograd.grad(total, [t for t in leaves if t is not None]))
    return out.detach(), final.detach(), [None if t is None else next(grads) for t in leaves]


def hold(results, expected, dtype):
    for value, wanted in zip(results, expected):
        if wanted is None:
            assert value is None
        else:
            assert value.shape == wanted.shape and value.dtype == dtype
            assert relative_error(value, wanted) < LIMIT[dtype]


@pytest.mark.parametrize('silu, bias', [(True, True), (False, False)])
@pytest.mark.parametrize('length', [1, 2, 17])
@pytest.mark.parametrize('dtype', LIMIT, ids=str)
def test_all_argument_lists(dtype, length, silu, bias, device):
    import causal_conv1d_cuda as module

    x, weight, bias, before = make_inputs(dtype, device, length, bias)
    dout, dfinal = torch.randn_like(x), torch.randn_like(before)
    out, _, grads = truth(x, weight, bias, None, dout, silu)
    hold([module.causal_conv1d_fwd(x, weight, bias, silu)], [out], dtype)
    hold([module.causal_conv1d_fwd(x, weight, bias, None, silu)], [out], dtype)
    hold(module.causal_conv1d_bwd(x, weight, bias, dout, None, silu), grads[:3], dtype)
    place = torch.empty_like(x)
    results = module.causal_conv1d_bwd(x, weight, bias, dout, None, place, silu)
    assert results[0] is place
    hold(results, grads[:3], dtype)
    results = module.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, place, False, silu)
    assert results[0] is place and results[3] is None

    out, final, grads = truth(x, weight, bias, before, dout, silu, dfinal)
    last = torch.empty_like(before)
    hold([module.causal_conv1d_fwd(x, weight, bias, None, before, last, silu), last], [out, final], dtype)
    hold(module.causal_conv1d_bwd(x, weight, bias, dout, None, before, dfinal, None, True, silu), grads, dtype)

    y, last = torch.empty_like(x), torch.empty_like(before)
    assert module.causal_conv1d_fwd(x, weight, bias, None, before, y, last, silu) is None
    hold([y, last], [out, final], dtype)
    places = [None if t is None else torch.zeros_like(t) for t in (x, weight, bias, before)]
    assert module.causal_conv1d_bwd(x, weight, bias, dout, None, before, dfinal, *places, silu) is None
    hold(places, grads, dtype)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_python_function(dtype, device):
    from causal_conv1d import causal_conv1d_fn
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    x, weight, bias, before = make_inputs(dtype, device, 9)
    dout = torch.randn_like(x)
    expected, final, grads = truth(x, weight, bias, before, dout, True)
    leaves = [t.requires_grad_() for t in (x, weight, bias, before)]
    out, last = causal_conv1d_fn(
        x, weight, bias, initial_states=before, return_final_states=True, activation='swish'
    )  # fmt: skip
    hold([out, last, *torch.autograd.grad(out, leaves, dout)], [expected, final, *grads], dtype)
    assert torch.equal(causal_conv1d_ref(x, weight, bias, before, activation='silu'), out)


def test_update_goes_on_where_the_sequence_stopped(device):
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    x, weight, bias, _ = make_inputs(torch.float32, device, 12)
    whole = causal_conv1d_fn(x, weight, bias, activation='silu')
    _, state = causal_conv1d_fn(x[..., :7], weight, bias, return_final_states=True)
    parts = [causal_conv1d_update(x[..., t], state, weight, bias, 'silu') for t in (7, 8)]
    parts.append(causal_conv1d_update(x[..., 9:], state, weight, bias, 'silu'))
    assert relative_error(torch.cat((torch.stack(parts[:2], 2), parts[2]), 2), whole[..., 7:]) < 1e-6


def test_autocast_does_not_round_the_arithmetic(device):
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias, _ = make_inputs(torch.float32, device, 9)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(causal_conv1d_fn(x, weight, bias), causal_conv1d_fn(x.clone(), weight, bias))
        out = causal_conv1d_fn(x, weight, bias)
    assert out.dtype == torch.float32 and relative_error(out, causal_conv1d_fn(x, weight, bias)) < 1e-6


def test_refusals(device):
    import causal_conv1d_cuda as module
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    x, weight, bias, before = make_inputs(torch.float32, device, 9)
    index = torch.zeros(BATCH, 9, dtype=torch.int32, device=device)
    for call in (
        lambda: module.causal_conv1d_fwd(x, weight, bias, index, True),
        lambda: module.causal_conv1d_bwd(x, weight, bias, x, index, None, True),
        lambda: causal_conv1d_fn(x, weight, bias, index),
    ):
        with pytest.raises(NotImplementedError, match=r'seq_idx.*call it for each part'):
            call()
    with pytest.raises(NotImplementedError, match='causal_conv1d_update has no stand-in; call causal_conv1d'):
        module.causal_conv1d_update(x, before, weight)
    with pytest.raises(NotImplementedError, match='cache_seqlens has no stand-in'):
        causal_conv1d_update(x, before, weight, cache_seqlens=index)
    with pytest.raises(TypeError, match='got 6 arguments, expected 4, 5, 7, 8'):
        module.causal_conv1d_fwd(x, weight, bias, None, None, True)
    with pytest.raises(ValueError, match="activation is 'relu', expected None, silu or swish"):
        causal_conv1d_fn(x, weight, activation='relu')
    with pytest.raises(ValueError, match=r'weight has shape \(3, 4\), expected \(5, 4\)'):
        causal_conv1d_fn(x, weight[:3])
    with pytest.raises(ValueError, match=r'initial_states has shape \(2, 5, 2\), expected \(2, 5, 3\)'):
        causal_conv1d_fn(x, weight, initial_states=before[..., 1:])


def test_a_wrong_place_to_write_to(device):
    import causal_conv1d_cuda as module

    x, weight, bias, before = make_inputs(torch.float32, device, 9)
    forward = dict(initial_states=before, out=x.clone(), final_states=before.clone())
    backward = dict(dfinal_states=before, dx=x.clone(), dweight=weight.clone(), dbias=bias.clone(), dinitial=before + 0)

    def call_forward(**places):
        return module.causal_conv1d_fwd(x, weight, bias, None, *places.values(), True)

    def call_backward(**places):
        return module.causal_conv1d_bwd(x, weight, bias, x, None, before, *places.values(), True)

    for call, given in ((call_forward, forward), (call_backward, backward)):
        call(**given)
        for name, value in given.items():
            with pytest.raises(ValueError, match=rf'causal_conv1d_cuda: {name} has shape \(1,.*expected'):
                call(**{**given, name: value[None]})
            with pytest.raises(TypeError, match=f'causal_conv1d_cuda: {name} must be a tensor'):
                call(**{**given, name: 'text'})
    with pytest.raises(TypeError, match=r'out is None, expected a tensor of shape \(2, 5, 9\) to write to'):
        call_forward(**{**forward, 'out': None})


def test_a_wrong_state_of_the_update(device):
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    x, weight, bias, before = make_inputs(torch.float32, device, 9)
    for state, message in ((before[..., 1:], r'\(2, 5, 2\), expected \(2, 5, 3\)'), (before[:1], r'\(1, 5, 3\)')):
        with pytest.raises(ValueError, match='causal_conv1d_update: conv_state has shape ' + message):
            causal_conv1d_update(x[..., 0], state, weight, bias)
    with pytest.raises(TypeError, match='causal_conv1d_update: x must be a tensor'):
        causal_conv1d_update(1.0, before, weight, bias)
    with pytest.raises(ValueError, match=r'causal_conv1d_fn: final_states_out has shape \(1, 5, 3\)'):
        causal_conv1d_fn(x, weight, bias, None, before, True, before[:1])
