"""Averages of weights in a few launches."""

from collections import defaultdict

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

    def update_parameters(self, model: nn.Module) -> None:
        """Average the weights of a model in.

        Args:
            model (nn.Module): A model like the one that this was made from.
        """
        steps = int(self.steps)  # on the CPU, unless ``device`` says otherwise
        if self.update_buffers:
            source = model.state_dict()
            pairs = [(average, source[name]) for name, average in self.module.state_dict().items()]
        else:
            source = dict(model.named_parameters())
            pairs = [(average, source[name]) for name, average in self.module.named_parameters()]
        copied = list(zip(self.module.buffers(), model.buffers())) if not self.update_buffers else []
        if steps == 0:
            copied += pairs
        elif steps % self.interval == 0:
            for averages, values in _by_kind([pair for pair in pairs if pair[0].is_floating_point()]):
                if averages[0].device != values[0].device:
                    values = [value.to(averages[0].device) for value in values]
                torch._foreach_lerp_(averages, values, self.momentum)
        for averages, values in _by_kind(copied):
            torch._foreach_copy_(averages, values)
        self.steps += 1


def _by_kind(pairs: list):
    """Lists of tensors of one device and dtype each, from pairs of tensors."""
    kinds: dict = defaultdict(lambda: ([], []))
    for average, value in pairs:
        averages, values = kinds[average.device, average.dtype, value.device, value.dtype]
        averages.append(average.detach())
        values.append(value.detach())
    return kinds.values()
