"""Optimizer states of runs whose backbone still had the stages that nothing uses."""

import re

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmvmamba.models import VSSMBackbone
from mmvmamba.registry import register_hook

BUFFER = re.compile(r'(running_mean|running_var|num_batches_tracked)$')


@register_hook
class ResumeOlderRunHook(Hook):
    """Resume a run that was begun when a backbone built all stages, whatever its ``out_indices``.

    An optimizer's state knows its parameters by their order.  Those of stages that are not built any more leave it
    before the optimizer takes it up; every other run is resumed as without this hook.

    Raises:
        ValueError: If the order can't be told: the optimizer had other parameters than the saved model, or another
            order, as with rates that decay by layer.
    """

    priority = 'VERY_LOW'  # after hooks that bring the weights of a checkpoint into shape

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        optimizer = checkpoint.get('optimizer')
        if not isinstance(optimizer, dict) or 'param_groups' not in optimizer:
            return
        state = {re.sub(r'^module\.', '', key): value for key, value in checkpoint['state_dict'].items()}
        gone = _unused_keys(model, state)
        if not gone:
            return
        buffers = {name for name, _ in model.named_buffers()}
        names = [name for name in state if name not in buffers and not (name in gone and BUFFER.search(name))]
        _drop(optimizer, names, gone, state)
        runner.logger.info(f'left out the optimizer state of {sum(name in gone for name in names)} unused parameters')


def _unused_keys(model, state: dict) -> set:
    gone: set = set()
    for path, module in model.named_modules():
        if isinstance(module, VSSMBackbone):
            prefix = f'{path}.' if path else ''
            keys = [key[len(prefix) :] for key in state if key.startswith(prefix)]
            gone.update(prefix + key for key in module.unused(keys))
    return gone


def _drop(optimizer: dict, names: list, gone: set, state: dict) -> None:
    """Take the parameters ``gone`` out of an optimizer's state dict, in place."""
    numbers = [number for group in optimizer['param_groups'] for number in group['params']]
    if len(numbers) == len(names) - len(gone & set(names)):
        return  # a run of today, whose model was given weights of more stages
    moments = optimizer['state']
    fits = len(numbers) == len(names) and all(
        value.dim() == 0 or value.shape == state[name].shape
        for number, name in zip(numbers, names)
        for value in moments.get(number, {}).values()
        if hasattr(value, 'dim')
    )
    if not fits:
        raise ValueError(
            f'the checkpoint has an optimizer of {len(numbers)} parameters, expected one of the {len(names)} of its '
            f'model in their order, to leave out {len(gone)} weights of stages that are not built any more; load the '
            'weights alone (load_from without resume), or finish the run with the version that began it'
        )
    left_out = {number for number, name in zip(numbers, names) if name in gone}
    for group in optimizer['param_groups']:
        group['params'] = [number for number in group['params'] if number not in left_out]
    optimizer['param_groups'] = [group for group in optimizer['param_groups'] if group['params']]
    for number in left_out:
        moments.pop(number, None)
