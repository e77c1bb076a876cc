"""ConvNorms: what a norm takes over on a GPU changes no number; on the CPU the same way is taken for these tests."""

import pytest
import torch
from torch import nn

from mmvmamba.layers import conv_norm
from mmvmamba.layers.downsample import build_downsample
from mmvmamba.layers.norm import LayerNorm
from mmvmamba.layers.stem import build_stem

BUILDERS = dict(
    conv3x2=lambda norm: build_stem('conv3x2', 3, 16, norm),
    patch4=lambda norm: build_stem('patch4', 3, 16, norm),
    conv3=lambda norm: build_downsample('conv3', 16, 24, norm),
    conv2=lambda norm: build_downsample('conv2', 16, 24, norm),
)
DEVICES = ('cpu', 'cuda') if torch.cuda.is_available() else ('cpu',)


def build(name, norm='ln', device='cpu'):
    torch.manual_seed(0)
    layers = BUILDERS[name](norm)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn((2, 3, 13, 9) if name in ('conv3x2', 'patch4') else (2, 5, 7, 16))
    return layers.to(device), x.to(device)


def run(layers, x, monkeypatch, fusing):
    """Output, and gradients of ``x`` and of all parameters that want one."""
    monkeypatch.setattr(conv_norm, 'FUSING', ('cpu', 'cuda') if fusing else ())
    leaves = [x.detach().requires_grad_(), *(p for p in layers.parameters() if p.requires_grad)]
    y = layers(leaves[0])
    weight = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


def assert_same(layers, x, monkeypatch):
    for value, expected in zip(*(run(layers, x, monkeypatch, fusing) for fusing in (True, False)), strict=True):
        assert torch.allclose(value, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('norm', ['ln', 'bn'])
@pytest.mark.parametrize('name', BUILDERS)
def test_the_same_numbers_and_gradients(name, norm, device, monkeypatch):
    assert_same(*build(name, norm, device), monkeypatch)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('trained', ['0.bias', '2.bias', '5.weight'])
def test_partly_frozen(trained, device, monkeypatch):
    layers, x = build('conv3x2', device=device)
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(name == trained)
    assert_same(layers, x, monkeypatch)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    'place, layer',
    [
        (2, nn.LayerNorm(8)),
        (2, nn.Identity()),
        (4, nn.ReLU()),
        (4, nn.GELU('tanh')),
        (6, nn.ReLU()),
        (7, nn.Identity()),
    ],
    ids=str,
)
def test_a_replaced_layer(place, layer, device, monkeypatch):
    layers, x = build('conv3x2', device=device)
    layers[place] = layer.to(device)
    assert_same(layers, x, monkeypatch)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('end', [1, 3, 5, 6, 7])
def test_the_first_layers_alone(end, device, monkeypatch):
    layers, x = build('conv3x2', device=device)
    assert_same(layers[:end], x, monkeypatch)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('place', [0, 2, 4, 5, 7])
def test_a_hook_sees_the_layers_own_output(place, device, monkeypatch):
    layers, x = build('conv3x2', device=device)
    seen = []
    layers[place].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    assert_same(layers, x, monkeypatch)
    assert torch.allclose(*seen, rtol=1e-4, atol=1e-4)


def test_compiles_as_one_graph(monkeypatch):
    layers, x = build('conv3x2')
    monkeypatch.setattr(conv_norm, 'FUSING', ('cpu',))
    expected = layers(x)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(layers, fullgraph=True, backend='aot_eager')(x), expected, atol=1e-5)


def test_a_branch_and_what_follows_a_convolution_exclude_each_other():
    norm, x = LayerNorm(4), torch.ones(1, 2, 4)
    for options in (dict(shift=torch.ones(4)), dict(gelu=True)):
        with pytest.raises(ValueError, match='got a branch as well'):
            norm(x, x, **options)
