"""The archs as timm's models: ``import mmvmamba.integrations.timm``, then ``timm.create_model('vmamba_tiny_s1l8')``."""

from collections import OrderedDict
from typing import Any, Optional

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from mmvmamba.checkpoint import MisfitError, fit_weights
from mmvmamba.layers import VSSBlock
from mmvmamba.layers.norm import normalise
from mmvmamba.models.archs import ARCHS
from mmvmamba.models.vssm import VSSMBackbone

__all__ = ['VMamba']


class VMamba(VSSMBackbone):
    """A VMamba classifier with timm's conventions.

    Args:
        arch (str | dict): As in :class:`VSSMBackbone`.
        num_classes (int): 0 for none: ``forward`` gives the pooled map. Default: 1000.
        in_chans (int): Channels of an image. Default: 3.
        global_pool (str): ``avg``, ``max``, ..., or an empty string for the map itself. Default: ``avg``.
        drop_rate (float): Dropout before the classifier. Default: 0.
        drop_path_rate (float, optional): Default: the published rate of the arch.
    """

    def __init__(
        self,
        arch,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: Optional[float] = None,
    ):
        options: Any = ARCHS[arch] if isinstance(arch, str) else arch
        stages = len(options['depths'])
        super().__init__(arch, out_indices=(stages - 1,), drop_path_rate=drop_path_rate, in_channels=in_chans)
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.feature_info = [
            dict(num_chs=channels, reduction=4 * 2**i, module=f'layers.{i}')
            for i, channels in enumerate(self.arch.dims)
        ]
        self.num_features = self.head_hidden_size = self.arch.dims[-1]
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Put a new last layer in its place, an Identity for 0 classes."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = layer = nn.Linear(self.arch.dims[-1], num_classes)
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for a learning rate that falls from layer to layer."""
        blocks = r'^layers\.(\d+)' if coarse else [(r'^layers\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem=r'^patch_embed', blocks=blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in backward."""
        for module in self.modules():
            if isinstance(module, VSSBlock):
                module.with_cp = enable

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The normalised last map, (B, in_chans, H, W) to (B, C, H / 32, W / 32)."""
        return super().forward(x)[-1]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool a map and classify it, (B, C, h, w) to (B, num_classes)."""
        x = nn.functional.dropout(self.pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores, (B, in_chans, H, W) to (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt='NCHW', intermediates_only=False
    ):
        """The maps of stages before downsampling, as timm's models give them; the last one normalised with ``norm``."""
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt is {output_fmt!r}, expected NCHW')
        count = len(self.layers)
        wanted = _stages(indices, count)
        self._check_input(x)
        x, maps = self.patch_embed(x), []
        stage: Any
        for i, stage in enumerate(self.layers[: max(wanted) + 1] if stop_early else self.layers):
            x = stage(x)
            last = i == count - 1
            if i in wanted:
                maps.append(normalise(getattr(self, f'outnorm{i}'), x) if last and norm else x)
            if not last:
                x = stage.downsample(x)
        if intermediates_only:
            return maps
        return normalise(getattr(self, f'outnorm{count - 1}'), x), maps

    def prune_intermediate_layers(self, indices=None, prune_norm=False, prune_head=True) -> list:
        """Take away what maps of these stages do not need; gives the stages."""
        wanted = _stages(indices, len(self.layers))
        self.layers = self.layers[: max(wanted) + 1]
        if prune_head:
            self.reset_classifier(0, '')
        return wanted

    def init_weights(self) -> None:
        """Nothing: the constructor draws the weights."""

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As torch's; weights of a published classifier too, such as those of timm's ``checkpoint_path``."""
        published = any(key.startswith('classifier.') for key in state_dict)
        return super().load_state_dict(convert(state_dict, self) if published else state_dict, strict, assign)


def _stages(indices, count: int) -> list:
    """timm's ``indices`` as rising stage numbers: None is all, a number the last so many."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        return list(range(count))[-indices:]
    found = [i if i >= 0 else count + i for i in indices]
    if not found or any(not 0 <= i < count for i in found):
        raise ValueError(f'indices is {indices!r}, expected stages from 0 to {count - 1}')
    return found


def convert(state: dict, model: VMamba) -> dict:
    """timm's ``checkpoint_filter_fn``: weights in any known layout under the model's names.

    Raises:
        CheckpointError: If they do not fit.
    """
    adapt = dict(in_channels='adapt')
    try:
        fitted = fit_weights(_without_head(model), state, 'weights', adapt, model.unused, lambda _: None)
    except MisfitError:
        if set(state) >= set(model.state_dict()):
            return state
        raise
    head = {
        key: fitted.others[f'classifier.head.{key}']
        for key in ('weight', 'bias')
        if f'classifier.head.{key}' in fitted.others
    }
    return {**fitted.state, **{f'fc.{key}': value for key, value in head.items()}}


def _without_head(model: VMamba) -> OrderedDict:
    return OrderedDict((key, value) for key, value in model.state_dict().items() if not key.startswith('fc.'))


def _register(arch: str):
    def create(pretrained=False, **kwargs):
        options: Any = ARCHS[arch]
        features = dict(out_indices=tuple(range(len(options['depths']))), feature_cls='getter')
        return build_model_with_cfg(
            VMamba, name, pretrained, feature_cfg=features, pretrained_filter_fn=convert, **dict(kwargs, arch=arch)
        )

    name = create.__name__ = f'vmamba_{arch.replace("-", "_")}'
    create.__module__, create.__doc__ = __name__, f'VMamba, arch {arch!r}.'
    globals()[name] = create
    __all__.append(name)
    register_model(create)


default_cfgs = generate_default_cfgs(
    {
        f'vmamba_{arch.replace("-", "_")}': dict(
            url='',
            num_classes=1000,
            input_size=(3, 224, 224),
            crop_pct=0.875,
            interpolation='bicubic',
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            first_conv='patch_embed.0',
            classifier='fc',
        )
        for arch in ARCHS
    }
)
for _arch in ARCHS:
    _register(_arch)
