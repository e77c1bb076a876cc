"""Losses that are logged without a wait for the device at each iteration."""

import torch
from mmengine.hooks import RuntimeInfoHook

from mmvmamba.registry import register_hook
from mmvmamba.training.scalars import pending_history


@register_hook
class DeferredInfoHook(RuntimeInfoHook):
    """mmengine's ``RuntimeInfoHook``, in its place (``default_hooks.runtime_info``), that reads losses when asked.

    mmengine's hook reads every loss after every iteration: the host waits until the device is done, and the device
    then waits for the host.  Here losses stay on the device until the logger logs, a checkpoint is written or any
    other reader asks.  Values, log and checkpoints are the same.

    Histories of training also grow in blocks: mmengine copies the whole history for each new number, which takes
    milliseconds an iteration late in a long run.
    """

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        hub = runner.message_hub
        for key in hub.log_scalars:
            if key.startswith('train/'):
                pending_history(hub, key)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        for key, value in (outputs or {}).items():
            if isinstance(value, torch.Tensor):
                pending_history(runner.message_hub, f'train/{key}').update(value)
            else:
                runner.message_hub.update_scalar(f'train/{key}', value)
