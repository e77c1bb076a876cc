"""Replacing the core of copied SS2D layers by the fused one, where both agree."""

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from mmvmamba.layers import SS2D

from .fused_core import FusedCore, layout_of, parameter_of

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
    of four routes (or ``x_proj.weight`` and ``dt_projs.weight``), and by its method ``forward_core``.  The replacement
    stays only if, on random inputs and with noise on all parameters, the layer's output, the gradient of its input and
    that of every parameter are what they were.  Parameters, gradients, modes and random numbers stay as they are.

    Args:
        model (nn.Module): Changed in place; on any device.

    Returns:
        list[Fusion]: One for each SS2D layer; they are logged too.

    Raises:
        TypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model is a {type(model).__name__}, expected a torch.nn.Module')
    results = []
    for name, layer in model.named_modules():
        if not _is_candidate(layer):
            continue
        own = vars(layer).get('forward_core')
        try:
            difference = _fuse_layer(layer)
        except BaseException as why:
            _restore(layer, own)
            if not isinstance(why, KeepsCoreError):
                raise
            results.append(Fusion(name, False, str(why)))
        else:
            results.append(Fusion(name, True, f'largest relative difference {difference:.0e}'))
        logger.info(f'{name or "the model"}: {"fused" if results[-1].fused else "not fused"}, {results[-1].reason}')
    return results


def _restore(layer, own) -> None:
    vars(layer).pop('forward_core', None)
    if own is not None:
        layer.forward_core = own


def _fuse_layer(layer) -> float:
    channels = _check_parameters(layer)
    original, device = layer.forward_core, parameter_of(layer, 'x_proj_weight').device.type
    if isinstance(original, FusedCore):
        raise KeepsCoreError('it is fused already')
    if any(p.is_meta for p in layer.parameters()):
        raise KeepsCoreError('it has parameters on the device meta, which has no numbers to compare')
    with (
        torch.inference_mode(False),
        torch.autocast(device, enabled=False),
        _noisy(layer) as parameters,
        torch.random.fork_rng(devices=_devices(layer)),
    ):
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
    of_gradients = [why for why in failures if 'gradient' in why]  # whose output is right
    raise KeepsCoreError((of_gradients or failures)[0])


def _is_candidate(layer) -> bool:
    """Whether a module may be an SS2D layer, by its names."""
    if isinstance(layer, SS2D):  # our own
        return False
    return isinstance(getattr(layer, 'x_proj_weight', None), torch.Tensor) or all(
        hasattr(layer, name) for name in ('x_proj', 'A_logs', 'Ds')
    )


def _check_parameters(layer) -> int:
    """Check names, shapes and routes; returns the channels D of the scan."""
    parameters = {name: parameter_of(layer, name) for name in NAMES}
    missing = [name for name, parameter in parameters.items() if parameter is None]
    if missing:
        raise KeepsCoreError(f'it has no {", ".join(missing)}')
    if not callable(getattr(layer, 'forward_core', None)):
        raise KeepsCoreError('it has no method forward_core')
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name in ('x_proj_weight', 'dt_projs_weight'):
        if hasattr(layer, name) and shapes[name][0] != 4:
            raise KeepsCoreError(f'{name} is for {shapes[name][0]} routes, expected 4')
    x_proj, dt_projs, bias, A_logs, Ds = (parameter.numel() for parameter in parameters.values())
    channels = Ds // 4
    d_state, rank = A_logs // Ds, dt_projs // Ds
    if (x_proj, dt_projs, bias, A_logs, Ds) != (
        4 * channels * (rank + 2 * d_state), Ds * rank, Ds, Ds * d_state, 4 * channels
    ):  # fmt: skip
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
    weight = parameter_of(layer, 'x_proj_weight')
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
    _compare_one('output', result['output'], truth['output'], dtype)
    for name, expected in truth.items():
        if result[name] is None and expected is not None:
            raise KeepsCoreError(f'the {name} is lost with the fused core')
    for name, expected in truth.items():
        if result[name] is not None and expected is None:
            raise KeepsCoreError(f'the {name} is new with the fused core')
    return max(_compare_one(name, result[name], expected, dtype) for name, expected in truth.items())


def _compare_one(name, value, expected, dtype) -> float:
    if expected is None:
        return 0.0
    if value.shape != expected.shape:
        raise KeepsCoreError(f'the {name} has shape {tuple(value.shape)}, before {tuple(expected.shape)}')
    scale = expected.double().norm().clamp_min(1e-12)
    difference = float((value.double() - expected.double()).norm() / scale)
    if not difference < LIMITS.get(dtype, 1e-3):
        raise KeepsCoreError(f'the {name} differs by {difference:.0e}, relative to its size')
    return difference
