"""Replacing the core of copied SS2D layers by the fused one, where both agree."""

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from mmvmamba.layers import SS2D

from .fused_core import FusedCore, layout_of

NAMES = ('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A_logs', 'Ds')
BATCH, HEIGHT, WIDTH = 2, 5, 6  # of the random maps; the sizes differ, so that a shape tells its layout
LIMITS = {torch.float32: 1e-3, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 8e-2}

logger = logging.getLogger('mmvmamba.compat')


@dataclass(frozen=True)
class Fusion:
    """What became of one SS2D layer.

    Attributes:
        name (str): Of the module in the model.
        fused (bool): Whether its core is the fused one now.
        reason (str): Why not, or how large the differences were.
    """

    name: str
    fused: bool
    reason: str


class KeepsCoreError(Exception):
    """Why a layer is left as it is."""


def fuse(model: nn.Module) -> list:
    """Replace the core of SS2D layers of copied VMamba code by :func:`mmvmamba.ops.ss2d_scan`, where it is the same.

    A layer is known by its parameters ``x_proj_weight``, ``dt_projs_weight``, ``dt_projs_bias``, ``A_logs`` and ``Ds``
    of four routes, and by its method ``forward_core``.  The replacement stays only if, on random inputs and with noise
    on all parameters, the layer's output, the gradient of its input and that of every parameter are what they were.
    Parameters, gradients, modes and random numbers stay as they are.

    Args:
        model (nn.Module): Changed in place; on any device.

    Returns:
        list[Fusion]: One for each SS2D layer; they are logged too.
    """
    results = []
    for name, layer in model.named_modules():
        if not hasattr(layer, 'x_proj_weight') or isinstance(layer, SS2D):
            continue
        own = vars(layer).get('forward_core')
        try:
            difference = _fuse_layer(layer)
            results.append(Fusion(name, True, f'largest relative difference {difference:.0e}'))
        except KeepsCoreError as why:
            _restore(layer, own)
            results.append(Fusion(name, False, str(why)))
        logger.info(f'{name or "the model"}: {"fused" if results[-1].fused else "not fused"}, {results[-1].reason}')
    return results


def _restore(layer, own) -> None:
    vars(layer).pop('forward_core', None)
    if own is not None:
        layer.forward_core = own


def _fuse_layer(layer) -> float:
    channels = _check_parameters(layer)
    original = layer.forward_core
    if isinstance(original, FusedCore):
        raise KeepsCoreError('it is fused already')
    with _noisy(layer) as parameters, torch.random.fork_rng(devices=_devices(layer)):
        call: dict = {}

        def record(x, *positional, **named):
            call.update(x=x, positional=positional, named=named, y=original(x, *positional, **named))
            return call['y']

        layer.forward_core = record
        x = _find_input(layer, channels)
        truth = _run(layer, x, parameters)
        if not call:
            raise KeepsCoreError('its forward does not call forward_core')
        failures = []
        for core in _candidates(layer, channels, call):
            layer.forward_core = core
            try:
                return _compare(truth, _run(layer, x, parameters), x.dtype)
            except KeepsCoreError as why:
                failures.append(str(why))
    raise KeepsCoreError(failures[0])


def _check_parameters(layer) -> int:
    """Check names, shapes and routes; returns the channels D of the scan."""
    missing = [name for name in NAMES if not isinstance(getattr(layer, name, None), torch.Tensor)]
    if missing:
        raise KeepsCoreError(f'it has no {", ".join(missing)}')
    if not callable(getattr(layer, 'forward_core', None)):
        raise KeepsCoreError('it has no method forward_core')
    shapes = {name: tuple(getattr(layer, name).shape) for name in NAMES}
    routes = shapes['x_proj_weight'][0]
    if routes != 4:
        raise KeepsCoreError(f'x_proj_weight is for {routes} routes, expected 4')
    weight = shapes['dt_projs_weight']
    if len(weight) != 3 or weight[0] != 4 or len(shapes['x_proj_weight']) != 3:
        raise KeepsCoreError(f'dt_projs_weight has shape {weight}, expected (4, D, R)')
    channels, rank = weight[1:]
    d_state, left = divmod(shapes['x_proj_weight'][1] - rank, 2)
    expected = dict(
        x_proj_weight=4 * (rank + 2 * d_state) * channels,
        dt_projs_bias=4 * channels,
        A_logs=4 * channels * d_state,
        Ds=4 * channels,
    )
    wrong = [name for name, count in expected.items() if getattr(layer, name).numel() != count]
    if wrong or left or d_state < 1:
        raise KeepsCoreError(f'its shapes are not those of four routes: {shapes}')
    return channels


@contextmanager
def _noisy(layer):
    """Noise on all parameters, evaluation mode and gradients for everything, while a layer is tried.

    In place, so that tensors which share memory with a parameter follow it.
    """
    parameters = {name: p for name, p in layer.named_parameters() if p.is_floating_point()}
    modes = {module: module.training for module in layer.modules()}
    saved = {name: (p.detach().clone(), p.requires_grad) for name, p in parameters.items()}
    try:
        layer.eval()
        with torch.random.fork_rng(devices=_devices(layer)), torch.no_grad():
            for p in parameters.values():
                p.add_(0.1 * torch.randn_like(p))
                p.requires_grad_(True)
        yield parameters
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name][0])
                p.requires_grad_(saved[name][1])
        for module, training in modes.items():
            module.training = training


def _devices(layer) -> list:
    return list({p.device for p in layer.parameters() if p.is_cuda})


def _find_input(layer, channels) -> torch.Tensor:
    """A random map in the layout that the layer takes."""
    first = getattr(layer, 'in_proj', None)
    size = getattr(first, 'in_features', None) or getattr(first, 'in_channels', None) or channels
    weight = layer.x_proj_weight
    errors = []
    for shape in ((BATCH, HEIGHT, WIDTH, size), (BATCH, size, HEIGHT, WIDTH)):
        x = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        try:
            with torch.no_grad():
                layer(x)
            return x.requires_grad_()
        except Exception as error:  # whatever foreign code raises about a shape
            errors.append(f'{type(error).__name__}: {error}'.splitlines()[0])
    raise KeepsCoreError(f'it takes no random map of {size} channels ({errors[0]})')


def _run(layer, x, parameters) -> dict:
    """The layer's output, and the gradients of its input and its parameters by name."""
    try:
        with torch.enable_grad():
            y = layer(x)
            generator = torch.Generator().manual_seed(1)
            weight = torch.randn(y.shape, generator=generator).to(y)
            grads = torch.autograd.grad(y, [x, *parameters.values()], weight, allow_unused=True)
    except Exception as error:  # whatever foreign code raises
        raise KeepsCoreError(f'{type(error).__name__}: {error}') from error
    names = ['gradient of the input', *(f'gradient of {name}' for name in parameters)]
    return {'output': y.detach(), **dict(zip(names, grads))}


def _candidates(layer, channels, call):
    """Fused cores that take and give what the layer's own core does."""
    sizes = (BATCH, channels, HEIGHT, WIDTH)
    gets = layout_of(call['x'].shape, *sizes)
    if gets not in ('BDHW', 'BHWD'):
        raise KeepsCoreError(f'forward_core gets a tensor of shape {tuple(call["x"].shape)}, expected a map')
    made = dict(layer=layer, gets=gets, positional=call['positional'], named=call['named'])
    y = call['y']
    if isinstance(y, (tuple, list)):
        if len(y) != 4 or any(layout_of(part.shape, *sizes) != 'BDL' for part in y):
            raise KeepsCoreError(f'forward_core returns {len(y)} tensors that are not four routes (B, D, L)')
        return [FusedCore(gives='routes', **made)]
    gives: Optional[str] = layout_of(y.shape, *sizes)
    if gives is None:
        raise KeepsCoreError(f'forward_core returns a tensor of shape {tuple(y.shape)}, expected a map')
    norms = ['', 'BHWD', 'BDHW', 'BLD'] if isinstance(getattr(layer, 'out_norm', None), nn.Module) else ['']
    return [FusedCore(gives=gives, norm=norm, **made) for norm in norms]


def _compare(truth: dict, result: dict, dtype) -> float:
    """The largest relative difference.

    Raises:
        KeepsCoreError: If one is too large, or a gradient is there in one alone.
    """
    largest = 0.0
    for name, expected in truth.items():
        value = result[name]
        if (value is None) != (expected is None):
            raise KeepsCoreError(f'the {name} {"is lost" if value is None else "is new"} with the fused core')
        if expected is None:
            continue
        if value.shape != expected.shape:
            raise KeepsCoreError(f'the {name} has shape {tuple(value.shape)}, before {tuple(expected.shape)}')
        scale = expected.double().norm().clamp_min(1e-12)
        difference = float((value.double() - expected.double()).norm() / scale)
        if not difference < LIMITS.get(dtype, 1e-3):
            raise KeepsCoreError(f'the {name} differs by {difference:.0e}, relative to its size')
        largest = max(largest, difference)
    return largest
