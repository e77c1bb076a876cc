"""Layer-wise decay of the learning rate, for all three codebases."""

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmvmamba.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, and a learning rate that falls from layer to layer towards the image.

    A parameter of layer i of n has the factor ``layer_decay_rate ** (n - 1 - i)``, on top of every rule of the default
    constructor; see appendix C of `BEiT <https://arxiv.org/abs/2106.08254>`_.  A module with ``get_layer_depth(name,
    prefix)`` says which layer its parameters are of; all others (neck, head) have the factor 1.  mmpretrain has such a
    constructor for classifiers, mmdet and mmsegmentation only for fixed backbones.

    Args:
        optim_wrapper_cfg (dict): Of the optimizer's wrapper.
        paramwise_cfg (dict): That of the default constructor, and ``layer_decay_rate`` (float), above 0 and at most 1.

    Raises:
        TypeError: If ``layer_decay_rate`` is not a number.
        ValueError: If it is missing or out of range, or no module of the model knows its layers.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if rate is None:
            raise ValueError(f'paramwise_cfg is {self.paramwise_cfg}, expected layer_decay_rate in it')
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f'layer_decay_rate is {rate!r}, expected a number above 0 and at most 1')
        if not 0 < rate <= 1:
            raise ValueError(f'layer_decay_rate is {rate}, expected a number above 0 and at most 1')
        if self.base_lr is None:
            raise ValueError('the optimizer has no lr, expected one for layer_decay_rate to scale')

    def add_params(self, params: list, module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Append a group for each parameter, as the default constructor does, with its layer's learning rate.

        Args:
            params (list[dict]): The groups.
            module (nn.Module): A module of the model.
            prefix (str): Where its parameters' names begin. Default: none, the whole model.
        """
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return
        owners = {
            name: child
            for name, child in module.named_modules()
            if name and hasattr(child, 'get_layer_depth') and next(child.parameters(), None) is not None
        }
        if not owners:
            raise ValueError(f'no module of {type(module).__name__} has get_layer_depth, expected one for its layers')
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        rates: dict = {}
        for group in params:
            depths = {_depth(names[id(parameter)], owners) for parameter in group['params']}
            scale = max(self.paramwise_cfg['layer_decay_rate'] ** above for above in depths)
            group['lr'] = group.get('lr', self.base_lr) * scale
            group['lr_scale'] = scale
            rates.setdefault(min(depths), group['lr'])
        lines = [f'{above} below the head: {rates[above]:.3g}' for above in sorted(rates, reverse=True)]
        print_log(f'learning rates by layer: {", ".join(lines)}', logger='current')


def _depth(name: str, owners: dict) -> int:
    """How many layers there are above a parameter, 0 for the head."""
    for prefix, owner in owners.items():
        if name.startswith(f'{prefix}.'):
            layer, layers = owner.get_layer_depth(name, f'{prefix}.')
            return layers - 1 - layer
    return 0
