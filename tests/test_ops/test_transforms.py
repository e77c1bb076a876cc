"""Forward-mode derivatives, torch.func and vmap: right, or NotImplementedError naming the op; never zeros."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from mmvmamba.ops import (
    add_layer_norm,
    backend_report,
    conv2d_channel_last,
    cross_merge,
    cross_scan,
    depthwise_conv_silu,
    layer_norm,
    linear,
    mlp,
    selective_scan,
    ss2d_scan,
    ssd_scan,
)
from mmvmamba.ops.backend import OP_BACKENDS
from tests.test_ops.ss2d_inputs import make_parameters
from tests.test_ops.triton_interpreter import INTERPRETED, patch_interpreter, run_interpreted

STATUS = {status.name: status for status in backend_report()}


@pytest.mark.skipif(INTERPRETED, reason='this is the process that the interpreter runs in')
@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')
def test_in_a_process_with_the_interpreter():
    run_interpreted(__file__)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def scan(x, backend):
    """x (2, 4, 12)."""
    others = draw(2, 4, 12, seed=1), -draw(4, 1, seed=2).exp(), draw(2, 1, 1, 12, seed=3), draw(2, 1, 1, 12, seed=4)
    return selective_scan(x, *(value.to(x.dtype) for value in others), delta_softplus=True, backend=backend)


def core(x, backend):
    parameters = [value.to(x.device) for value in make_parameters(4, 2)]
    return ss2d_scan(x.view(*x.shape[:-1], 3, 4), *parameters, backend=backend)


def heads(x, backend):
    """Four steps of two heads of six channels."""
    x = x.view(*x.shape[:-1], 2, 6)
    others = draw(2, 4, 2, seed=1), -draw(2, seed=2).exp(), draw(2, 4, 1, 3, seed=3), draw(2, 4, 1, 3, seed=4)
    return ssd_scan(x, *(value.to(x.dtype) for value in others), dt_softplus=True, backend=backend)


def mixed_linear(x, backend):
    """The kernel serves mixed precision only."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=backend == 'cuda'):
        return linear(x, draw(4, 12, seed=1), backend=backend)


# x (2, 4, 12) -> y, for each op by its backend
SCANS = dict(
    selective_scan=scan,
    ss2d_scan=core,
    ssd_scan=heads,
    cross_scan=lambda x, backend: cross_scan(x.view(*x.shape[:-1], 3, 4), backend=backend),
    cross_merge=lambda x, backend: cross_merge(x.view(*x.shape[:-2], 4, 1, 12), (3, 4), backend=backend),
)
LAYERS = dict(
    layer_norm=lambda x, backend: layer_norm(x, draw(12, seed=1), draw(12, seed=2), backend=backend),
    add_layer_norm=lambda x, backend: add_layer_norm(x, x, draw(12, seed=1), draw(12, seed=2), backend=backend)[1],
    linear=mixed_linear,
    mlp=lambda x, backend: mlp(
        x[..., :8], draw(8, 8, seed=1), draw(8, seed=2), draw(8, 8, seed=3), draw(8, seed=4), backend=backend
    ),
    depthwise_conv_silu=lambda x, backend: depthwise_conv_silu(
        x.unsqueeze(-3), draw(12, 1, 3, 3, seed=1), backend=backend
    ),
    conv2d_channel_last=lambda x, backend: conv2d_channel_last(
        x.unsqueeze(-3), draw(4, 12, 3, 3, seed=1), padding=1, backend=backend
    ),
)
LINEAR = ('cross_scan', 'cross_merge')
CASES = [('naive', name, function) for name, function in SCANS.items()]
if INTERPRETED:
    patch_interpreter()
    DEVICE = 'cpu'
    CASES = [('triton', name, function) for name, function in SCANS.items()]
elif STATUS['cuda'].available:
    DEVICE = 'cuda'
    CASES += [(b, name, f) for b in ('cuda', 'triton') for name, f in SCANS.items() if b in OP_BACKENDS[name]]
    CASES += [(backend, name, f) for backend in ('cuda', 'naive') for name, f in LAYERS.items()]
else:
    DEVICE = 'cpu'
    CASES += [('cpu', name, function) for name, function in SCANS.items()] if STATUS['cpu'].available else []
    # 'auto' too: the kernels for a CPU leave what they lack to torch's own layers
    CASES += [(backend, name, f) for backend in ('naive', 'auto') for name, f in LAYERS.items()]
parametrize = pytest.mark.parametrize('backend, name, function', CASES, ids=lambda value: str(value)[:20])


@pytest.fixture(autouse=True)
def _let_triton_run_on_cpu(monkeypatch):
    """By the interpreter, which the rule of backends does not know; in small blocks, as it is slow."""
    if INTERPRETED:
        from mmvmamba.ops import backend
        from mmvmamba.ops.ss2d.tiling import TILINGS

        monkeypatch.setattr(backend, '_check_can_run', lambda op, name, device_type: None)
        monkeypatch.setitem(TILINGS, 'one', replace(TILINGS['one'], elements=32, narrowest=8))


def bind(function, backend):
    return lambda x: function(x, backend).float()


def directional_derivative(function, x, tangent, step=1e-3):
    """By finite differences."""
    with torch.no_grad():
        return (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)


def refused(backend, name):
    return backend not in ('naive', 'auto') and name not in LINEAR


@parametrize
def test_forward_mode(backend, name, function):
    function = bind(function, backend)
    x, tangent = draw(2, 4, 12), draw(2, 4, 12, seed=9)

    def differentiate():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent

    if refused(backend, name):
        with pytest.raises(NotImplementedError, match=f'{name}: forward-mode derivatives'):
            differentiate()
        x.requires_grad_()
        with pytest.raises(NotImplementedError, match=f'{name}: forward-mode derivatives'):
            differentiate()
        return
    expected = directional_derivative(function, x, tangent)
    assert (differentiate() - expected).abs().max() < 2e-2 * expected.abs().max()
    x.requires_grad_()
    derivative = differentiate()
    assert (derivative - expected).abs().max() < 2e-2 * expected.abs().max()


@parametrize
def test_jvp(backend, name, function):
    function = bind(function, backend)
    x, tangent = draw(2, 4, 12), draw(2, 4, 12, seed=9)
    if refused(backend, name):
        with pytest.raises(NotImplementedError, match=f'{name}: forward-mode derivatives'):
            torch.func.jvp(function, (x,), (tangent,))
        return
    y, derivative = torch.func.jvp(function, (x,), (tangent,))
    expected = directional_derivative(function, x, tangent)
    assert torch.allclose(y, function(x), rtol=1e-3, atol=1e-4)
    assert (derivative - expected).abs().max() < 2e-2 * expected.abs().max()


@parametrize
def test_grad_and_vjp(backend, name, function):
    function = bind(function, backend)
    x = draw(2, 4, 12)
    if backend not in ('naive', 'auto'):
        for transform in (torch.func.grad(lambda x: function(x).sum()), lambda x: torch.func.vjp(function, x)):
            with pytest.raises(NotImplementedError, match=f"{name}: torch.func's derivatives"):
                transform(x)
        return
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
    assert torch.allclose(torch.func.grad(lambda x: function(x).square().sum())(x), expected, rtol=1e-3, atol=1e-4)


@parametrize
def test_vmap_and_its_gradient(backend, name, function):
    function = bind(function, backend)
    x = draw(3, 2, 4, 12).requires_grad_()
    y = torch.vmap(function, randomness='same')(x)  # of the fixed seeds above
    expected = torch.stack([function(sample) for sample in x])
    assert torch.allclose(y, expected, rtol=1e-3, atol=1e-4)
    dy = draw(*y.shape, seed=5)
    for value, reference in zip(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)):
        assert torch.allclose(value, reference, rtol=1e-3, atol=1e-3) and reference.abs().sum() > 0


@pytest.mark.parametrize('name', LINEAR)
def test_linear_ops_have_all_derivatives(name):
    """Compiled ones too: second derivatives, a Jacobian by forward mode, and gradients of derivatives."""
    backend = CASES[-1][0] if INTERPRETED else 'triton' if DEVICE == 'cuda' else None
    function = bind(SCANS[name], backend)
    x = draw(2, 4, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    naive = bind(SCANS[name], 'naive')
    (expected,) = torch.autograd.grad(naive(x).pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(second, expected, rtol=1e-4, atol=1e-4)
    x, few = draw(1, 4, 12), draw(2)

    def along(function):
        """A Jacobian by forward mode under vmap."""
        return torch.func.jacfwd(lambda scale: function(x * (1 + scale.sum() * x)))(few)

    assert torch.allclose(along(function), along(naive), rtol=1e-4, atol=1e-5)
