"""Averages of weights in a few launches."""

import weakref
from collections import defaultdict
from typing import Any

import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

from mmvmamba.registry import MODELS


@MODELS.register_module()
class ForeachEMA(ExponentialMovingAverage):
    """mmengine's ``ExponentialMovingAverage`` by multi-tensor kernels: a few launches rather than one a tensor.

    Values and checkpoints are mmengine's own, bit for bit.  In a config:
    ``dict(type='EMAHook', ema_type='mmvmamba.ForeachEMA', momentum=1e-4)``.

    Arguments are those of ``ExponentialMovingAverage``.
    """

    _model: Any = None

    def update_parameters(self, model: nn.Module) -> None:
        """Average the weights of a model in.

        Args:
            model (nn.Module): A model like the one that this was made from. The same modules at each call take the
                least time.
        """
        if self._model is None or self._model[0]() is not model:
            places = (_places(self.module), _places(model))
            if any(map(len, (set(one) ^ set(two) for one, two in zip(*places)))):
                raise ValueError('the model has other parameters or buffers than the one that is averaged')
            self.__dict__['_model'] = weakref.ref(model), *places
        (weights, buffers), (source, source_buffers) = ([_read(kind) for kind in part] for part in self._model[1:])
        steps = int(self.steps)  # on the CPU, unless ``device`` says otherwise
        averaged, copied = weights, buffers
        if self.update_buffers:
            persistent = self.module.state_dict().keys()
            averaged = {**weights, **{name: buffer for name, buffer in buffers.items() if name in persistent}}
            copied = {}
        source = {**source_buffers, **source}
        lerped = {}
        if steps == 0:
            copied = {**copied, **averaged}
        elif steps % self.interval == 0:
            lerped = {name: value for name, value in averaged.items() if value.is_floating_point()}
        for averages, values in _by_kind(lerped, source):
            if averages[0].device != values[0].device:
                values = [value.to(averages[0].device) for value in values]
            torch._foreach_lerp_(averages, values, self.momentum)
        for averages, values in _by_kind(copied, source):
            torch._foreach_copy_(averages, values)
        self.steps += 1

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ('_model', '_compiled_call_impl')}


def _places(model: nn.Module) -> tuple:
    """Where a model keeps its parameters and its buffers: by name, the dict of a module and the key there."""
    parameters: dict = {}
    buffers: dict = {}
    seen: set = set()
    for prefix, module in model.named_modules():
        for found, kept in ((parameters, module._parameters), (buffers, module._buffers)):
            for key, value in kept.items():
                if value is not None and id(value) not in seen:  # shared ones count once
                    seen.add(id(value))
                    found[f'{prefix}.{key}' if prefix else key] = kept, key
    return parameters, buffers


def _read(places: dict) -> dict:
    return {name: kept[key].detach() for name, (kept, key) in places.items()}


def _by_kind(averages: dict, values: dict):
    """Lists of tensors of one device and dtype each, from tensors by name."""
    kinds: dict = defaultdict(lambda: ([], []))
    for name, average in averages.items():
        value = values[name]
        ours, theirs = kinds[average.device, average.dtype, value.device, value.dtype]
        ours.append(average)
        theirs.append(value)
    return kinds.values()
