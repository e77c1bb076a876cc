"""The archs by name, and what an arch dict may hold."""

from dataclasses import dataclass, fields
from typing import Optional

from mmvmamba.layers.options import SS2DOptions, check_bool, check_choice, check_int, check_number

_SSM_KEYS = tuple(field.name for field in fields(SS2DOptions))

_V2 = dict(stem='conv3x2', downsample='conv3', norm_layer='ln2d', d_state=1, conv_bias=False, gate='none')
_V0 = dict(
    stem='patch4',
    downsample='merge',
    norm_layer='ln',
    mlp_ratio=0.0,
    d_state=16,
    ssm_ratio=2.0,
    conv_bias=True,
    gate='silu',
    force_fp32=True,
)
_M2 = dict(
    stem='conv3x2',
    downsample='conv3',
    norm_layer='ln',
    core='ssd',
    d_state=64,
    conv_bias=False,
    act='gelu',
    gate='none',
    ssm_init='zeros',
)

ARCHS = {
    'nano': dict(_V2, dims=32, depths=(1, 1, 2, 1), drop_path_rate=0.0),
    'tiny-s1l8': dict(_V2, dims=96, depths=(2, 2, 8, 2), drop_path_rate=0.2),
    'small-s1l20': dict(_V2, dims=96, depths=(2, 2, 20, 2), drop_path_rate=0.3),
    'base-s1l20': dict(_V2, dims=128, depths=(2, 2, 20, 2), drop_path_rate=0.5),
    'tiny-s2l5': dict(_V2, dims=96, depths=(2, 2, 5, 2), ssm_ratio=2.0, drop_path_rate=0.2),
    'small-s2l15': dict(_V2, dims=96, depths=(2, 2, 15, 2), ssm_ratio=2.0, drop_path_rate=0.3),
    'base-s2l15': dict(_V2, dims=128, depths=(2, 2, 15, 2), ssm_ratio=2.0, drop_path_rate=0.6),
    'tiny-v0': dict(_V0, dims=96, depths=(2, 2, 9, 2), drop_path_rate=0.2),
    'small-v0': dict(_V0, dims=96, depths=(2, 2, 27, 2), drop_path_rate=0.3),
    'base-v0': dict(_V0, dims=128, depths=(2, 2, 27, 2), drop_path_rate=0.6),
    'tiny-m2': dict(_M2, dims=96, depths=(2, 2, 4, 2), drop_path_rate=0.2),
    'small-m2': dict(_M2, dims=96, depths=(2, 2, 12, 2), drop_path_rate=0.3),
    'base-m2': dict(_M2, dims=128, depths=(2, 2, 12, 2), drop_path_rate=0.3),
}
"""Options of the archs; v2 is VMamba's final design, v0 the vanilla one of the first paper, m2 the one with Mamba-2."""


@dataclass(frozen=True)
class Arch:
    """Checked options of a backbone.

    Attributes:
        dims (tuple[int]): Channels of each stage; an integer doubles from stage to stage.
        depths (tuple[int]): Blocks of each stage.
        ssm (SS2DOptions): Options of the token mixer; given flat in an arch dict.
        in_channels (int): Channels of the image.
        stem (str): patch4 or conv3x2.
        patch_size (int): Pixels of the image a side for one of the first map, even for conv3x2.
        patch_norm (bool): Whether the stem has norms.
        pos_embed (bool): Whether a learned position embedding is added to the stem's map; it is resized to other sizes
            bicubically.
        img_size (int): Side of the images that the position embedding is made for.
        downsample (str): merge, conv2, conv3, or none, which keeps resolution and channels.
        norm_layer (str): ln, ln2d or bn.
        post_norm (bool): Whether the norms of a block follow its branches rather than precede them.
        mlp (str): mlp or gmlp.
        mlp_ratio (float): Width of the MLP over its channels; 0 for none.
        mlp_act (str): Activation of the MLP.
        mlp_dropout (float): Dropout in the MLP.
        drop_path_rate (float): Stochastic depth of the last block; rises linearly from 0 at the first.
    """

    dims: tuple
    depths: tuple
    ssm: SS2DOptions
    in_channels: int = 3
    stem: str = 'conv3x2'
    patch_size: int = 4
    patch_norm: bool = True
    pos_embed: bool = False
    img_size: int = 224
    downsample: str = 'conv3'
    norm_layer: str = 'ln2d'
    post_norm: bool = False
    mlp: str = 'mlp'
    mlp_ratio: float = 4.0
    mlp_act: str = 'gelu'
    mlp_dropout: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self):
        for name in ('stem', 'downsample', 'norm_layer', 'mlp', 'mlp_act'):
            check_choice(name, getattr(self, name))
        for name in ('patch_norm', 'pos_embed', 'post_norm'):
            check_bool(name, getattr(self, name))
        check_int('in_channels', self.in_channels, 1, 2**16)
        check_int('patch_size', self.patch_size, 1, 256)
        if self.stem == 'conv3x2' and self.patch_size % 2:
            raise ValueError(f'patch_size is {self.patch_size}, expected an even number for stem conv3x2')
        check_int('img_size', self.img_size, 1, 2**16)
        if self.pos_embed and self.img_size < self.patch_size:
            raise ValueError(f'img_size is {self.img_size}, expected at least patch_size, {self.patch_size}')
        check_number('mlp_ratio', self.mlp_ratio, low=0, high=64)
        check_number('mlp_dropout', self.mlp_dropout, low=0, high=1)
        check_number('drop_path_rate', self.drop_path_rate, low=0, high=1)
        if self.drop_path_rate == 1:
            raise ValueError('drop_path_rate is 1, expected less: a branch that is never kept has no scale')
        for name in ('dims', 'depths'):
            for i, value in enumerate(getattr(self, name)):
                check_int(f'{name}[{i}]', value, 1, 2**16)
        if self.mlp_ratio > 0 and int(self.mlp_ratio * min(self.dims)) < 1:
            raise ValueError(f'mlp_ratio is {self.mlp_ratio}, which leaves no channel of {min(self.dims)}; 0 is no MLP')
        if self.mlp_ratio == 0 and self.ssm.ssm_ratio == 0:
            raise ValueError('ssm_ratio and mlp_ratio are both 0, which leaves no branch of a block')
        if self.downsample == 'none' and len(set(self.dims)) > 1:
            raise ValueError(f'dims has {self.dims}, expected equal channels for downsample none')
        if len(self.dims) != len(self.depths):
            raise ValueError(
                f'dims has {len(self.dims)} stages and depths has {len(self.depths)}; expected the same number'
            )
        if self.stem == 'conv3x2' and self.dims[0] % 2:
            raise ValueError(f'dims[0] is {self.dims[0]}, expected an even number for stem conv3x2')


def build_arch(arch, drop_path_rate: Optional[float] = None, in_channels: Optional[int] = None) -> Arch:
    """Check an arch name or dict.

    Args:
        arch (str | dict): A name in :data:`ARCHS`, or a dict with ``dims``, ``depths`` and any options of
            :class:`Arch` and :class:`mmvmamba.layers.SS2DOptions`; what it leaves out has VMamba v2's value.
        drop_path_rate (float, optional): Replaces the arch's own.
        in_channels (int, optional): Likewise.

    Returns:
        Arch: The checked options.

    Raises:
        TypeError: If an option is unknown or of a wrong type, or ``dims`` or ``depths`` is missing.
        ValueError: If an arch name is unknown or a value is out of range.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch is {arch!r}, expected one of {", ".join(ARCHS)} or a dict of options')
        arch = ARCHS[arch]
    if not isinstance(arch, dict):
        raise TypeError(f'arch is a {type(arch).__name__}, expected a name or a dict of options')
    options = dict(arch)
    known = [field.name for field in fields(Arch) if field.name != 'ssm'] + list(_SSM_KEYS)
    unknown = sorted(str(name) for name in set(options) - set(known))
    if unknown:
        raise TypeError(f'arch has unknown options {", ".join(unknown)}; known are {", ".join(known)}')
    for name in ('dims', 'depths'):
        if name not in options:
            raise TypeError(f'arch has no {name!r}')
    if options.get('core') == 'ssd':
        options.setdefault('act', 'gelu')  # as published
    ssm = SS2DOptions(**{name: options.pop(name) for name in _SSM_KEYS if name in options})
    options['depths'] = _as_tuple('depths', options['depths'])
    if isinstance(options['dims'], int) and not isinstance(options['dims'], bool):
        options['dims'] = tuple(options['dims'] * 2**i for i in range(len(options['depths'])))
    options['dims'] = _as_tuple('dims', options['dims'])
    if drop_path_rate is not None:
        options['drop_path_rate'] = drop_path_rate
    if in_channels is not None:
        options['in_channels'] = in_channels
    return Arch(ssm=ssm, **options)


def _as_tuple(name: str, value) -> tuple:
    if not isinstance(value, (tuple, list)) or not value:
        raise TypeError(f'{name} is {value!r}, expected a list of integers')
    return tuple(value)
