"""ConvNorms: what a norm takes over changes no number."""

import pytest
import torch
from torch import nn

from mmvmamba.layers.downsample import build_downsample
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
    x = torch.randn((2, 3, 13, 9) if name in ('conv3x2', 'patch4') else (2, 16, 5, 7))
    return layers.to(device), x.to(device)


def one_by_one(layers, x):
    """What the layers give when each is called by itself; torch's own LayerNorm normalises the last dimension."""
    for layer in layers:
        if type(layer) is nn.LayerNorm:
            x = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = layer(x)
    return x


def run(layers, call, x):
    """Output, and gradients of ``x`` and of all parameters that want one."""
    leaves = [x.detach().requires_grad_(), *(p for p in layers.parameters() if p.requires_grad)]
    y = call(leaves[0])
    weight = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


def assert_same(layers, x):
    results = (run(layers, call, x) for call in (layers, lambda x: one_by_one(layers, x)))
    for value, expected in zip(*results, strict=True):
        # a batch norm takes away the bias before it, whose gradient is rounding alone
        assert torch.allclose(value, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('norm', ['ln', 'bn'])
@pytest.mark.parametrize('name', BUILDERS)
def test_the_same_numbers_and_gradients(name, norm, device):
    assert_same(*build(name, norm, device))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('trained', ['0.bias', '2.bias', '5.weight'])
def test_partly_frozen(trained, device):
    layers, x = build('conv3x2', device=device)
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(name == trained)
    assert_same(layers, x)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    'place, layer',
    [
        (2, nn.LayerNorm(8)),
        (0, nn.Conv2d(3, 8, 3, stride=(2, 1), padding=1)),
        (5, nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)),
        (5, nn.Conv2d(8, 16, 3, padding='same', dilation=2)),
        (5, nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode='reflect')),
        (2, nn.Identity()),
        (4, nn.ReLU()),
        (4, nn.GELU('tanh')),
        (6, nn.ReLU()),
        (7, nn.Identity()),
    ],
    ids=str,
)
def test_a_replaced_layer(place, layer, device):
    layers, x = build('conv3x2', device=device)
    layers[place] = layer.to(device)
    assert_same(layers, x)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('end', [1, 3, 5, 6, 7])
def test_the_first_layers_alone(end, device):
    layers, x = build('conv3x2', device=device)
    assert_same(layers[:end], x)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('place', [0, 2, 4, 5, 7])
def test_a_hook_sees_the_layers_own_output(place, device):
    layers, x = build('conv3x2', device=device)
    seen = []
    layers[place].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    assert_same(layers, x)
    assert torch.allclose(*seen, rtol=1e-4, atol=1e-4)


def test_compiles_as_one_graph():
    layers, x = build('conv3x2')
    expected = layers(x)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(layers, fullgraph=True, backend='aot_eager')(x), expected, atol=1e-5)
