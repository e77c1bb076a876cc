"""VSSMBackbone: VMamba as a backbone for mmpretrain, mmdet and mmsegmentation."""

import functools
import re
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvmamba.checkpoint import MisfitError, load_pretrained, upgrade_hook
from mmvmamba.layers import Stage, VSSBlock
from mmvmamba.layers.downsample import build_downsample
from mmvmamba.layers.norm import build_norm, normalise
from mmvmamba.layers.options import check_bool
from mmvmamba.layers.stem import build_stem
from mmvmamba.registry import register_backbone

from .archs import ARCHS, build_arch

__all__ = ['ARCHS', 'VSSMBackbone', 'fitting_archs']


@register_backbone
class VSSMBackbone(BaseModule):
    """Visual state-space model, section 4 of `VMamba <https://arxiv.org/abs/2401.10166>`_.

    Args:
        arch (str | dict): A name in :data:`mmvmamba.models.ARCHS` (``nano``, ``tiny-s1l8``, ``small-s1l20``,
            ``base-s1l20``, ``tiny-s2l5``, ``small-s2l15``, ``base-s2l15``, ``tiny-v0``, ``small-v0``, ``base-v0``,
            ``tiny-m2``, ``small-m2``, ``base-m2``), or a dict of options, see
            :func:`mmvmamba.models.archs.build_arch`. Default: ``tiny-s1l8``.
        out_indices (Sequence[int]): Stages whose normalised maps are returned. Those after the last of them are not
            built; loading leaves their weights out, and says so in a log line. Default: (0, 1, 2, 3).
        drop_path_rate (float, optional): Stochastic depth. Default: the published rate of the arch.
        frozen_stages (int): -1 freezes nothing, k >= 0 the stem and the first k stages. Default: -1.
        with_cp (bool): Whether to recompute the activations of each block in backward. Default: False.
        norm_eval (bool): Whether batch norms stay in eval mode while training. Default: False.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=path_or_url)`` loads strictly, see
            :mod:`mmvmamba.checkpoint`. Default: None.

    Raises:
        TypeError: If an option is unknown or of a wrong type.
        ValueError: If ``arch`` is unknown or a value is out of range.

    Note:
        The backbone compiles into one graph, static or dynamic, for inference and training:
        ``backbone.compile(fullgraph=True)``, with ``mode='reduce-overhead'`` for CUDA graphs at small batches.  In a
        config, ``compile=True`` has mmengine's Runner compile the model around it too.

    Examples:
        >>> model = VSSMBackbone('nano')
        >>> [tuple(out.shape) for out in model(torch.rand(1, 3, 64, 64))]
        [(1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4), (1, 256, 2, 2)]
    """

    def __init__(
        self,
        arch='tiny-s1l8',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=None,
        frozen_stages=-1,
        with_cp=False,
        norm_eval=False,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.arch = arch = build_arch(arch, drop_path_rate)
        stages = len(arch.depths)
        self.out_indices = _check_out_indices(out_indices, stages)
        if isinstance(frozen_stages, bool) or not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= stages:
            raise ValueError(f'frozen_stages is {frozen_stages!r}, expected an integer from -1 to {stages}')
        for name, value in (('with_cp', with_cp), ('norm_eval', norm_eval)):
            check_bool(name, value)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.num_features = list(arch.dims)

        self.patch_embed = build_stem(arch.stem, arch.in_channels, arch.dims[0], arch.norm_layer)
        rates = torch.linspace(0, arch.drop_path_rate, sum(arch.depths), device='cpu').tolist()
        self.layers = nn.ModuleList()
        last = max(self.out_indices)
        for i, depth in enumerate(arch.depths[: last + 1]):
            blocks = [
                VSSBlock(
                    arch.dims[i],
                    arch.ssm,
                    arch.mlp,
                    arch.mlp_ratio,
                    arch.mlp_act,
                    arch.mlp_dropout,
                    rates.pop(0),
                    arch.norm_layer,
                    with_cp,
                )
                for _ in range(depth)
            ]
            downsample: nn.Module = nn.Identity()
            if i < last:
                downsample = build_downsample(arch.downsample, arch.dims[i], arch.dims[i + 1], arch.norm_layer)
            self.layers.append(Stage(blocks, downsample))
        for i in self.out_indices:
            self.add_module(f'outnorm{i}', build_norm(arch.norm_layer, arch.dims[i]))
        self.apply(_init_linear)
        self._freeze_stages()
        # whole official detectors and segmentors load as they are, whatever their age
        self._register_load_state_dict_pre_hook(upgrade_hook)
        self._register_load_state_dict_pre_hook(_leave_out_unused, with_module=True)

    def forward(self, x: torch.Tensor) -> tuple:
        """Compute the feature maps of ``out_indices``.

        Args:
            x (Tensor): Images, (B, in_channels, H, W), at least 4 pixels a side.

        Returns:
            tuple[Tensor]: For stage i a contiguous map (B, dims[i], h, w), where h and w are about H / 4 / 2**i and
            W / 4 / 2**i.

        Raises:
            ValueError: If ``x`` has the wrong shape.
        """
        self._check_input(x)
        x = self.patch_embed(x)
        outs = []
        stage: Any
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in self.out_indices:
                # mmcv's ops (RoIAlign, ...) read memory as contiguous, whatever the strides say
                outs.append(normalise(getattr(self, f'outnorm{i}'), x).contiguous())
            if i < len(self.layers) - 1:
                x = stage.downsample(x)
        return tuple(outs)

    def _check_input(self, x: torch.Tensor) -> None:
        channels = self.arch.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f'x has shape {tuple(x.shape)}, expected images of shape (B, {channels}, H, W)')
        if x.shape[0] < 1 or min(x.shape[2:]) < 4:
            raise ValueError(f'x has shape {tuple(x.shape)}, expected at least one image of at least 4x4 pixels')

    def unused(self, keys) -> list:
        """Those of a state dict's keys which belong to what the arch has, but ``out_indices`` makes no use of."""
        built, stages = len(self.layers), len(self.arch.depths)
        kept = re.compile(rf'layers\.{built - 1}\.downsample\.') if built < stages else None
        left_out = []
        for key in keys:
            match = re.match(r'(?:layers\.|outnorm)(\d{1,4})\.', key)
            if match and (built <= int(match[1]) < stages or (kept and kept.match(key))):
                left_out.append(key)
        return left_out

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``; without one the weights stay as the constructor drew them."""
        if self.init_cfg is None:
            return
        self.load_pretrained(self.init_cfg)
        self._is_init = True

    def load_pretrained(self, init_cfg: dict) -> None:
        """:func:`mmvmamba.checkpoint.load_pretrained`, whose error names the archs that would fit."""
        try:
            load_pretrained(self, init_cfg, self.unused)
        except MisfitError as error:
            archs = ' or '.join(map(repr, fitting_archs(error.shapes)))
            error.hint = f'it fits arch {archs}' if archs else f'no known arch fits; {error.hint}'
            raise

    def train(self, mode: bool = True):
        """Set the mode, but keep frozen stages and, with ``norm_eval``, batch norms in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.patch_embed, *self.layers[: self.frozen_stages]]
        frozen += [getattr(self, f'outnorm{i}') for i in self.out_indices if i < self.frozen_stages]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)


def fitting_archs(shapes: dict) -> list:
    """Find the archs of :data:`ARCHS` whose weights have these names and shapes.

    Args:
        shapes (dict): Shape of each weight of a backbone; norms of output maps are not compared.

    Returns:
        list[str]: Names of archs.
    """
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith('outnorm')}
    return [arch for arch in ARCHS if _shapes_of_arch(arch) == shapes]


@functools.cache
def _shapes_of_arch(arch: str) -> dict:
    with torch.device('meta'):
        state = VSSMBackbone(arch).state_dict()
    return {key: value.shape for key, value in state.items() if not key.startswith('outnorm')}


def _leave_out_unused(model: VSSMBackbone, state_dict: dict, prefix: str, *_) -> None:
    """Take the weights of stages that are not built out of a state dict, as a pre-hook of ``load_state_dict``."""
    unused = model.unused(key[len(prefix) :] for key in state_dict if key.startswith(prefix))
    for key in unused:
        del state_dict[prefix + key]
    if unused:
        print_log(
            f'left out {len(unused)} weights that out_indices={model.out_indices} does not use '
            f"({prefix}{unused[0]}, ...); custom_hooks=[dict(type='mmvmamba.ResumeOlderRunHook')] resumes an "
            'optimizer that had them',
            logger='current',
        )


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_out_indices(out_indices, stages: int) -> tuple:
    if not isinstance(out_indices, (int, tuple, list)):
        raise TypeError(f'out_indices is {out_indices!r}, expected a list of stage numbers')
    indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    valid = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < stages for i in indices)
    if not indices or not valid or list(indices) != sorted(set(indices)):
        raise ValueError(f'out_indices is {out_indices!r}, expected rising stage numbers from 0 to {stages - 1}')
    return indices
