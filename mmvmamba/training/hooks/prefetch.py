"""Batches that go to the device without a wait."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmvmamba.registry import register_hook
from mmvmamba.training.batches import send


@register_hook
class PrefetchHook(Hook):
    """Copy each batch to the GPU on a stream of its own: ``dict(type='mmvmamba.PrefetchHook')``.

    The codebases' preprocessors copy each tensor, each label and each box by itself, and the host waits every time
    until the GPU has done all that was asked before.  Here the host runs ahead, and copies overlap with the iteration
    before.  Images should be in pinned memory: ``train_dataloader.pin_memory=True``.  Values are the same.  Without a
    GPU the hook does nothing.

    Data samples are changed in place: hooks find their tensors on the GPU.  A batch that is no dict or list is left to
    the preprocessor.
    """

    priority = 'HIGH'
    _stream: Any = None
    _device: Any = None

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        device = torch.device(getattr(getattr(model, 'data_preprocessor', None), 'device', 'cpu'))
        if device.type == 'cuda':
            self._device = torch.device('cuda', torch.cuda.current_device()) if device.index is None else device
            self._stream = torch.cuda.Stream(self._device)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self._stream is not None and isinstance(data_batch, (dict, list)):
            send(data_batch, self._device, self._stream)

    def after_train(self, runner) -> None:
        self._stream = None
