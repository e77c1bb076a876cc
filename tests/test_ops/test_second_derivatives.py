"""The kernels' gradients have none of their own: asking for it is an error, never a gradient without a part."""

import pytest
import torch

from mmvmamba.ops import (
    add_layer_norm,
    backend_report,
    conv2d_channel_last,
    depthwise_conv_silu,
    layer_norm,
    linear,
    mlp,
    selective_scan,
    ss2d_scan,
    ssd_scan,
    use_backend,
)
from mmvmamba.ops.backend import OP_BACKENDS
from tests.test_ops.ss2d_inputs import make_parameters

STATUS = {status.name: status for status in backend_report()}


def mixed_linear(x, draw):
    with torch.autocast(x.device.type, torch.bfloat16):
        return linear(x, draw(4, 8))


LAYERS = dict(
    layer_norm=lambda x, draw: layer_norm(x, draw(8), draw(8), shift=draw(8), gelu=True),
    add_layer_norm=lambda x, draw: add_layer_norm(x, draw(2, 5, 6, 8), draw(8), draw(8))[1],
    linear=mixed_linear,
    mlp=lambda x, draw: mlp(x, draw(16, 8), draw(16), draw(8, 16), draw(8)),
    depthwise_conv_silu=lambda x, draw: depthwise_conv_silu(x, draw(8, 1, 3, 3), draw(8)),
    conv2d_channel_last=lambda x, draw: conv2d_channel_last(x, draw(8, 8, 3, 3), draw(8), padding=1),
)


def scan(x, draw, backend):
    u = x.flatten(1, 2)
    return selective_scan(u, draw(2, 30, 8), -draw(30, 1).exp(), draw(2, 1, 1, 8), draw(2, 1, 1, 8), backend=backend)


def core(x, draw, backend):
    parameters = [value.to(x.device) for value in make_parameters(8, 2)]
    return ss2d_scan(x.permute(0, 3, 1, 2), *parameters, backend=backend)


def heads(x, draw, backend):
    x = x.flatten(1, 2).unflatten(2, (2, 4))
    return ssd_scan(x, draw(2, 30, 2).exp(), -draw(2).exp(), draw(2, 30, 1, 3), draw(2, 30, 1, 3), backend=backend)


SCANS = [(scan, 'selective_scan'), (core, 'ss2d_scan'), (heads, 'ssd_scan')]


def differentiate_twice(function, device):
    def draw(*shape):
        return torch.randn(shape, device=device, requires_grad=True)

    x = draw(2, 5, 6, 8)
    (gradient,) = torch.autograd.grad(function(x, draw).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


@pytest.mark.parametrize('op', LAYERS)
def test_torchs_own_layers_have_them(op):
    with use_backend('naive'):
        assert differentiate_twice(LAYERS[op], 'cpu').abs().sum() > 0


@pytest.mark.parametrize(
    'device, op',
    [
        pytest.param(device, op, marks=pytest.mark.skipif(not STATUS[device].available, reason=STATUS[device].reason))
        for device in ('cpu', 'cuda')
        for op in LAYERS
        if device in OP_BACKENDS[op] and (device, op) != ('cpu', 'conv2d_channel_last')  # for compiled graphs
    ],
)
def test_the_kernels_of_layers_refuse(device, op):
    with pytest.raises(NotImplementedError, match=f'{op}: second derivatives are not compiled'):
        differentiate_twice(LAYERS[op], device)


@pytest.mark.parametrize(
    'backend, op, name',
    [
        pytest.param(
            backend, op, name, marks=pytest.mark.skipif(not STATUS[backend].available, reason=STATUS[backend].reason)
        )
        for backend in ('cpu', 'cuda', 'triton')
        for op, name in SCANS
        if backend in OP_BACKENDS[name]
    ],
)
def test_the_scans_refuse(backend, op, name):
    device = 'cpu' if backend == 'cpu' else 'cuda'
    with pytest.raises(NotImplementedError, match=f'{name}: second derivatives'):
        differentiate_twice(lambda x, draw: op(x, draw, backend), device)


@pytest.mark.parametrize('op, name', SCANS)
def test_the_naive_scans_have_them(op, name):
    assert differentiate_twice(lambda x, draw: op(x, draw, 'naive'), 'cpu').abs().sum() > 0
