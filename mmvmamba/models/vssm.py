"""VSSMBackbone: VMamba as a backbone for mmpretrain, mmdet and mmsegmentation."""

import contextlib
import functools
import re
from typing import Any, Optional

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvmamba.checkpoint import Fitted, MisfitError, fit_weights, load_pretrained, upgrade_hook
from mmvmamba.layers import Stage, VSSBlock
from mmvmamba.layers.downsample import build_downsample
from mmvmamba.layers.masking import apply_mask
from mmvmamba.layers.norm import build_norm, normalise
from mmvmamba.layers.options import check_bool
from mmvmamba.layers.position import add_position, build_position, resize_position
from mmvmamba.layers.stem import build_stem, smallest_side
from mmvmamba.registry import register_backbone

from .archs import ARCHS, build_arch

__all__ = ['ARCHS', 'VSSMBackbone', 'fitting_archs']
_FIRST = 'patch_embed.0.weight'


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
        strides (Sequence[int]): Of each stage, 2 or 1, behind the stem (so that the first is 1): (1, 2, 2, 1) gives an
            output stride of 16, (1, 2, 1, 1) one of 8. Weights are those of a stride of 2. Archs that merge patches
            cannot. Default: 2 from the second on.
        out_stem (bool): Whether the first map returned is that between the two convolutions of the stem, (B,
            dims[0] / 2, H / 2, W / 2), for decoders like that of U-Net; not for a ``patch4`` stem. Default: False.
        mask_token (bool): Whether ``forward`` takes a ``mask``; makes the weight ``mask_token``. Default: False.
        in_channels (int, optional): Channels of an image. Weights of another number are refused, or converted by
            ``in_channels='adapt'`` in ``init_cfg``. Default: that of the arch, 3.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=path_or_url)`` loads strictly, see
            :mod:`mmvmamba.checkpoint`. Default: None.

    Raises:
        TypeError: If an option is unknown or of a wrong type.
        ValueError: If ``arch`` is unknown or a value is out of range.

    Note:
        The backbone compiles into one graph, static or dynamic, for inference and training:
        ``backbone.compile(fullgraph=True)``, with ``mode='reduce-overhead'`` for CUDA graphs at small batches.  In a
        config, :class:`~mmvmamba.training.hooks.CompileHook` does it.

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
        strides=None,
        out_stem=False,
        mask_token=False,
        in_channels=None,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.arch = arch = build_arch(arch, drop_path_rate, in_channels)
        self.in_channels = arch.in_channels
        stages = len(arch.depths)
        self.out_indices = _check_out_indices(out_indices, stages)
        if isinstance(frozen_stages, bool) or not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= stages:
            raise ValueError(f'frozen_stages is {frozen_stages!r}, expected an integer from -1 to {stages}')
        switches = dict(with_cp=with_cp, norm_eval=norm_eval, out_stem=out_stem, mask_token=mask_token)
        for name, value in switches.items():
            check_bool(name, value)
        if out_stem and arch.stem == 'patch4':
            raise ValueError("out_stem is True, but stem 'patch4' has one convolution only, expected 'conv3x2'")
        strides = _check_strides(strides, stages)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.out_stem = out_stem
        self.num_features = list(arch.dims)

        self.patch_embed = build_stem(
            arch.stem, arch.in_channels, arch.dims[0], arch.norm_layer, arch.patch_size, arch.patch_norm
        )
        self._smallest_side = smallest_side(arch.stem, arch.patch_size)
        if arch.pos_embed:
            self.pos_embed = build_position(arch.dims[0], arch.img_size // arch.patch_size)
        if mask_token:
            self.mask_token = build_position(arch.dims[0], 1)
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
                    arch.post_norm,
                )
                for _ in range(depth)
            ]
            downsample: nn.Module = nn.Identity()
            if i < last:
                downsample = build_downsample(
                    arch.downsample, arch.dims[i], arch.dims[i + 1], arch.norm_layer, strides[i + 1]
                )
            self.layers.append(Stage(blocks, downsample))
        for i in self.out_indices:
            self.add_module(f'outnorm{i}', build_norm(arch.norm_layer, arch.dims[i]))
        self.apply(_init_linear)
        self._freeze_stages()
        # whole official detectors and segmentors load as they are, whatever their age
        self._register_load_state_dict_pre_hook(upgrade_hook)
        self._register_load_state_dict_pre_hook(_leave_out_unused, with_module=True)
        self._register_load_state_dict_pre_hook(_fit_position, with_module=True)

    def forward(self, x: torch.Tensor, mask: Optional[torch.Tensor] = None) -> tuple:
        """Compute the feature maps of ``out_indices``.

        Args:
            x (Tensor): Images, (B, in_channels, H, W), at least 4 pixels a side, and more for a large ``patch_size``.
            mask (Tensor, optional): (B, H / 4, W / 4), 1 for what the mask token replaces. Default: nothing.

        Returns:
            tuple[Tensor]: For stage i a contiguous map (B, dims[i], h, w), where h and w are about
            H / patch_size / 2**i and W / patch_size / 2**i, unless ``strides`` says otherwise; before them, with
            ``out_stem``, that of the stem.

        Raises:
            ValueError: If ``x`` has the wrong shape.
        """
        self._check_input(x)
        outs = []
        stem: Any = self.patch_embed
        if self.out_stem:
            half = stem.first_half(x)
            outs.append(half.contiguous())
            x = stem(x, half)
        else:
            x = stem(x)
        if mask is not None:
            if not hasattr(self, 'mask_token'):
                raise ValueError('mask is given, but the backbone has no mask_token; build it with mask_token=True')
            x = apply_mask(x, mask, self.mask_token)
        if self.arch.pos_embed:
            x = add_position(x, self.pos_embed)
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
        channels = self.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f'x has shape {tuple(x.shape)}, expected images of shape (B, {channels}, H, W)')
        side = self._smallest_side
        if x.shape[0] < 1 or min(x.shape[2:]) < side:
            raise ValueError(
                f'x has shape {tuple(x.shape)}, expected at least one image of at least {side}x{side} pixels'
            )

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

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple:
        """Which layer a parameter is of, for a learning rate that falls from layer to layer.

        Args:
            param_name (str): Name of a parameter of the model.
            prefix (str): Where the backbone's names begin. Default: none.

        Returns:
            tuple[int, int]: The layer and the number of layers, n + 2 for n blocks. Stem and position are layer 0,
            block i (from 1, over all) is layer i, and a downsampling is of the layer of the block before it. Norms of
            output maps and all that is not of the backbone are of the last layer, n + 1.
        """
        depths = self.arch.depths[: len(self.layers)]
        layers = sum(depths) + 2
        name = param_name[len(prefix) :] if param_name.startswith(prefix) else ''
        if name.startswith(('patch_embed.', 'pos_embed', 'mask_token')):
            return 0, layers
        match = re.match(r'layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.', name)
        if match is None:
            return layers - 1, layers
        stage = int(match[1])
        return sum(depths[:stage]) + (depths[stage] if match[2] is None else int(match[2]) + 1), layers

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``; without one the weights stay as the constructor drew them."""
        if self.init_cfg is None:
            return
        self.load_pretrained(self.init_cfg)
        self._is_init = True

    def load_pretrained(self, init_cfg: dict) -> None:
        """:func:`mmvmamba.checkpoint.load_pretrained`, whose error names the archs that would fit."""
        with self._naming_archs():
            load_pretrained(self, init_cfg, self.unused, functools.partial(_fit_position, self))

    def fit_weights(self, content: dict, name: str, options: dict) -> Fitted:
        """:func:`mmvmamba.checkpoint.fit_weights` likewise."""
        with self._naming_archs():
            adapt = functools.partial(_fit_position, self)
            return fit_weights(self.state_dict(), content, name, options, self.unused, adapt)

    @contextlib.contextmanager
    def _naming_archs(self):
        try:
            yield
        except MisfitError as error:
            archs = ' or '.join(map(repr, fitting_archs(error.shapes)))
            error.hint = f'it fits arch {archs}' if archs else f'no known arch fits; {error.hint}'
            channels = error.shapes[_FIRST][1] if archs else self.in_channels
            if channels != self.in_channels:
                error.hint += (
                    f" with in_channels={channels}; init_cfg=dict(..., in_channels='adapt') converts its weights"
                )
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
        if self.arch.pos_embed:
            self.pos_embed.requires_grad_(False)


def fitting_archs(shapes: dict) -> list:
    """Find the archs of :data:`ARCHS` whose weights have these names and shapes.

    Args:
        shapes (dict): Shape of each weight of a backbone; norms of output maps and the number of channels of an image
            are not compared.

    Returns:
        list[str]: Names of archs.
    """
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith('outnorm')}
    first = shapes.get(_FIRST)
    if first is not None and len(first) == 4:
        shapes[_FIRST] = torch.Size([first[0], 3, *first[2:]])
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


def _fit_position(model: VSSMBackbone, state_dict: dict, prefix: str = '', *_) -> None:
    """Resize the position embedding in a state dict to the model's, as a pre-hook of ``load_state_dict``."""
    name = f'{prefix}pos_embed'
    found = state_dict.get(name)
    if not model.arch.pos_embed or found is None:
        return
    size = tuple(model.pos_embed.shape[2:])
    if found.dim() == 4 and tuple(found.shape[2:]) != size:
        state_dict[name] = resize_position(found, size)
        print_log(f'resized {name} from {tuple(found.shape[2:])} to {size}', logger='current')


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_strides(strides, stages: int) -> tuple:
    if strides is None:
        return (1,) + (2,) * (stages - 1)
    valid = isinstance(strides, (tuple, list)) and len(strides) == stages
    if not valid or any(stride not in (1, 2) or isinstance(stride, bool) for stride in strides) or strides[0] != 1:
        raise ValueError(f'strides is {strides!r}, expected 1 and then 1 or 2 for each of {stages - 1} stages')
    return tuple(strides)


def _check_out_indices(out_indices, stages: int) -> tuple:
    if not isinstance(out_indices, (int, tuple, list)):
        raise TypeError(f'out_indices is {out_indices!r}, expected a list of stage numbers')
    indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    valid = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < stages for i in indices)
    if not indices or not valid or list(indices) != sorted(set(indices)):
        raise ValueError(f'out_indices is {out_indices!r}, expected rising stage numbers from 0 to {stages - 1}')
    return indices
