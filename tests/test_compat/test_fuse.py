"""Fusing copied SS2D layers: where the replacement is the same, and where it is refused."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from mmvmamba import compat
from mmvmamba.compat import fusing
from mmvmamba.compat.fused_core import FusedCore
from mmvmamba.compat.fusing import Fusion
from tests.test_compat import layers
from tests.test_ops.scan_inputs import relative_error

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU'))]
FUSED = {
    'OldSS2D': (layers.OldSS2D, (2, 7, 9, 6)),
    'NewSS2D': (layers.NewSS2D, (2, 7, 9, 6)),
    'GroupedSS2D': (layers.GroupedSS2D, (2, 7, 9, 6)),
    'ChannelFirstSS2D': (layers.ChannelFirstSS2D, (2, 6, 7, 9)),
}
KEPT = {
    'SharedSS2D': 'the gradient of dt_projs.weight is lost with the fused core',
    'KeptSS2D': 'the gradient of dt_projs.weight is lost with the fused core',
    'StaleSS2D': 'the output differs by',
    'TwoRouteSS2D': 'x_proj_weight is for 2 routes, expected 4',
    'OtherOrderSS2D': 'the output differs by',
    'SilentSS2D': 'its forward does not call forward_core',
    'StrideSS2D': 'it takes no random map of 6 channels (ValueError: this layer takes maps of 8 rows)',
    'MessyNormSS2D': 'the output',
}


def state_of(layer):
    """All that fusing must leave as it is."""
    return (
        {name: p.detach().clone() for name, p in layer.named_parameters()},
        {name: (p.requires_grad, p.grad is None) for name, p in layer.named_parameters()},
        [module.training for module in layer.modules()],
        torch.get_rng_state(),
    )


def assert_same_state(before, after):
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:3] == after[1:3] and torch.equal(before[3], after[3])


def run(model, x):
    model.zero_grad()
    out = model(x)
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out))
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('d_state', [1, 2])
@pytest.mark.parametrize('name', FUSED)
def test_fused(name, d_state, device):
    kind, shape = FUSED[name]
    layer = kind(d_state=d_state).to(device)
    layer.Ds.requires_grad_(False)
    model = nn.Sequential(layer, nn.Identity())
    plain, before = copy.deepcopy(model).eval(), state_of(model)
    (result,) = compat.fuse(model)
    assert isinstance(result, Fusion) and result.fused and result.name == '0', result
    assert isinstance(layer.forward_core, FusedCore)
    assert_same_state(before, state_of(model))
    model.eval()
    x = torch.randn(shape, device=device)
    (out, grads), (expected, wanted) = run(model, x), run(plain, x)
    assert relative_error(out, expected) < 1e-5
    for key, gradient in wanted.items():
        assert (gradient is None) == (grads[key] is None), key
        assert gradient is None or relative_error(grads[key], gradient) < 1e-4, key
    (again,) = compat.fuse(model)
    assert not again.fused and again.reason == 'it is fused already' and isinstance(layer.forward_core, FusedCore)


@pytest.mark.parametrize('name', KEPT)
def test_kept(name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('mmvmamba.compat'), 'propagate', True)
    caplog.set_level('INFO', logger='mmvmamba.compat')
    layer = getattr(layers, name)()
    own, before = vars(layer).get('forward_core'), state_of(layer)
    (result,) = compat.fuse(layer)
    assert not result.fused and result.reason.startswith(KEPT[name]), result.reason
    assert vars(layer).get('forward_core') is own
    assert_same_state(before, state_of(layer))
    assert f'the model: not fused, {KEPT[name]}' in caplog.text


def test_what_is_no_such_layer():
    class Odd(layers.OldSS2D):
        def __init__(self):
            super().__init__()
            self.A_logs = nn.Parameter(self.A_logs[:-1].clone())

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.x_proj_weight = nn.Parameter(torch.ones(4, 5, 6))

    model = nn.ModuleDict(dict(odd=Odd(), bare=Bare(), linear=nn.Linear(2, 2)))
    reasons = {row.name: row.reason for row in compat.fuse(model)}
    assert reasons.keys() == {'odd', 'bare'}
    assert reasons['odd'].startswith('its shapes are not those of four routes')
    assert reasons['bare'] == 'it has no dt_projs_weight, dt_projs_bias, A_logs, Ds'


def test_our_own_layers_are_left_alone():
    from mmvmamba import VSSMBackbone

    assert compat.fuse(VSSMBackbone('nano')) == []


def test_a_fused_model_copies_pickles_and_compiles():
    model = nn.Sequential(layers.OldSS2D(), layers.NewSS2D()).eval()
    assert [row.fused for row in compat.fuse(model)] == [True, True]
    x = torch.randn(1, 4, 5, 6)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].forward_core.layer is other[0]
        assert torch.equal(other(x), expected)
    assert relative_error(torch.compile(model, backend='aot_eager')(x), expected) < 1e-5
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert relative_error(model(x), expected) < 3e-2
    with pytest.raises(TypeError, match=r'forward_core: called with .* besides x, but fused for'):
        model[0].forward_core(x.permute(0, 3, 1, 2), True)


@pytest.mark.parametrize('around', [torch.no_grad, torch.inference_mode, lambda: torch.autocast('cpu', torch.bfloat16)])
def test_what_is_around_the_call_changes_nothing(around):
    layer = layers.NewSS2D()
    with around():
        (result,) = compat.fuse(layer)
    assert result.fused, result
    layer(torch.randn(1, 4, 5, 6)).sum().backward()
    assert layer.x_proj_weight.grad is not None


def test_parameters_without_numbers():
    layer = layers.OldSS2D().to('meta')
    own = layer.forward_core
    (result,) = compat.fuse(layer)
    assert result.reason.startswith('it has parameters on the device meta') and layer.forward_core is own


def test_an_error_leaves_a_layer_as_it_was(monkeypatch):
    layer = layers.OldSS2D()
    own, before = layer.forward_core, state_of(layer)
    monkeypatch.setattr(fusing, '_compare', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compat.fuse(layer)
    assert layer.forward_core is own
    assert_same_state(before, state_of(layer))


def test_a_parametrised_weight():
    layer = layers.NewSS2D()
    nn.utils.parametrize.register_parametrization(layer, 'x_proj_weight', nn.Identity())
    (result,) = compat.fuse(layer)
    assert result.fused and result.name == ''


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r'model is a dict, expected a torch\.nn\.Module'):
        compat.fuse(dict(layers.OldSS2D().state_dict()))
