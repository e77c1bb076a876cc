"""The published code's spelling: ``forward_type`` strings and the keyword names of its ``MM_VSSM``."""

from pathlib import PurePosixPath

from mmengine.logging import print_log

from mmvmamba.layers.options import check_bool, check_int, check_number
from mmvmamba.registry import register_backbone

from .vssm import VSSMBackbone

# version: (scan_mode, force_fp32); versions differ further only in the kernel they used
_VERSIONS = dict(
    v0=('cross2d', True),
    v0seq=('cross2d', True),  # one route after the other: the same numbers
    v01=('cross2d', True),
    v02=('cross2d', True),
    v03=('cross2d', True),
    v04=('cross2d', False),
    v05=('cross2d', False),
    v051d=('unidi', False),
    v052d=('bidi', False),
    v052dc=('cascade2d', False),
    v2=('cross2d', True),
    v3=('cross2d', False),
    m0=('cross2d', False),
    # the names of April 2024
    v1=('cross2d', True),
    v4=('cross2d', False),
    v31d=('unidi', False),
    v32d=('bidi', False),
    v32dc=('cascade2d', False),
)
_POSTFIXES = dict(
    no32=('force_fp32', False),
    oact=('out_act', True),
    noz=('gate', 'none'),
    nozact=('gate', 'linear'),
    onnone=('out_norm', 'none'),
    ondwconv3=('out_norm', 'dwconv3'),
    oncnorm=('out_norm', 'cnorm'),
    onsoftmax=('out_norm', 'softmax'),
    onsigmoid=('out_norm', 'sigmoid'),
)
# also of April 2024, written without an underscore
_BARE_POSTFIXES = dict(
    none=('out_norm', 'none'),
    dwconv3=('out_norm', 'dwconv3'),
    softmax=('out_norm', 'softmax'),
    sigmoid=('out_norm', 'sigmoid'),
)
_STEMS = dict(v1='patch4', v2='conv3x2')
_DOWNSAMPLES = dict(v1='merge', v2='conv2', v3='conv3', none='none')
# what a config inherits from Swin's in mmdet or mmseg and the published class swallowed
_SWIN_KEYS = (
    'pretrain_img_size',
    'embed_dims',
    'window_size',
    'num_heads',
    'strides',
    'qkv_bias',
    'qk_scale',
    'drop_rate',
    'attn_drop_rate',
    'use_abs_pos_embed',
    'ape',
    'act_cfg',
    'norm_cfg',
    'convert_weights',
)
_SSM_INITS = dict(v0='mamba', v1='randn', v2='zeros')


def parse_forward_type(forward_type: str) -> dict:
    """Translate a ``forward_type`` of the published code, such as ``v05_noz`` or, as in April 2024, ``v3noz``.

    Args:
        forward_type (str): A version (v0, v0seq, v01 to v05, v051d, v052d, v052dc, v2, v3, m0; or v1, v4, v31d, v32d,
            v32dc) and postfixes in any order, with or without ``_`` before each.

    Returns:
        dict: ``scan_mode``, ``gate``, ``out_norm``, ``out_act`` and ``force_fp32`` for an arch dict; of m0 ``core``.

    Raises:
        TypeError: If ``forward_type`` is not a string.
        ValueError: If it can't be read, can be read in two ways, or two postfixes contradict each other.
    """
    if not isinstance(forward_type, str):
        raise TypeError(f'forward_type is {forward_type!r}, expected a string such as "v05_noz"')
    place = f'forward_type is {forward_type!r}'
    readings = _readings(forward_type) if len(forward_type) < 100 else []  # each postfix is there once
    if not readings:
        raise ValueError(f'{place}: {_misreading(forward_type)}')
    if len(readings) > 1:
        ways = ' or '.join('_'.join(reading) for reading in readings[:2])
        raise ValueError(f'{place}, which can be read as {ways}; write the postfixes with "_" between them')
    version, *postfixes = readings[0]
    scan_mode, force_fp32 = _VERSIONS[version]
    options = dict(scan_mode=scan_mode, gate='silu', out_norm='ln', out_act=False, force_fp32=force_fp32)
    if version == 'm0':
        options['core'] = 'ssd'
    given: dict = {}
    for postfix in postfixes:
        option, value = {**_POSTFIXES, **_BARE_POSTFIXES}[postfix]
        if option in given:
            raise ValueError(f'{place}: "{postfix}" and "{given[option]}" both set {option}')
        given[option] = postfix
        options[option] = value
    return options


def _readings(text: str) -> list:
    """Every way to read a ``forward_type`` as a version and postfixes, those with long names first."""
    found = []
    for version in sorted(_VERSIONS, key=len, reverse=True):
        if text.startswith(version):
            found += [(version, *rest) for rest in _split_postfixes(text[len(version) :])]
    return found


def _split_postfixes(text: str) -> list:
    if not text:
        return [()]
    tokens = {**{f'_{name}': name for name in _POSTFIXES}, **{name: name for name in (*_POSTFIXES, *_BARE_POSTFIXES)}}
    found = []
    for token in sorted(tokens, key=len, reverse=True):
        if text.startswith(token):
            found += [(tokens[token], *rest) for rest in _split_postfixes(text[len(token) :])]
    return found


def _misreading(text: str) -> str:
    """Why a ``forward_type`` can't be read."""
    if text.startswith('xv'):
        return 'the variants xv1a to xv3a do not run in the published code, so there is nothing to reproduce'
    versions = sorted((version for version in _VERSIONS if text.startswith(version)), key=len)
    if not versions:
        return f'unknown version, expected one of {", ".join(_VERSIONS)}'
    known = ', '.join(f'_{name}' for name in _POSTFIXES)
    return f'unknown postfix in {text[len(versions[-1]) :]!r} after {versions[-1]}, expected some of {known}'


@register_backbone
class MM_VSSM(VSSMBackbone):
    """:class:`VSSMBackbone` under the keyword names of the published code, so that its config files run unchanged.

    Those inherit Swin's configs and keep the keys: what means nothing here (``embed_dims``, ``num_heads``,
    ``window_size``, ..., and an ``init_cfg`` with weights of Swin) is named in one log line and ignored.  Any other
    unknown key is an error.

    Args:
        out_indices (Sequence[int]): Stages whose maps are returned. Default: (0, 1, 2, 3).
        pretrained (str, optional): Path or URL of a checkpoint, as ``init_cfg`` of :class:`VSSMBackbone`; an empty
            one is none.
        norm_layer (str): ln, ln2d or bn, in any case. Default: ``ln``.
        depths (Sequence[int]): Blocks of each stage. Default: (2, 2, 9, 2).
        dims (int | Sequence[int]): Channels. Default: (96, 192, 384, 768).
        ssm_d_state (int): Default: 16.
        ssm_ratio (float): 0 for blocks without the scan. Default: 2.
        ssm_rank_ratio (float): Of early configs; without effect unless it is below ``ssm_ratio``, which is refused.
        ssm_dt_rank (int | str): Default: ``auto``.
        ssm_act_layer (str): Default: ``silu``.
        ssm_conv (int): Kernel size; below 2 for no convolution. Default: 3.
        ssm_conv_bias (bool): Default: True.
        ssm_drop_rate (float): Default: 0.
        ssm_init (str): v0, v1 or v2. Default: ``v0``.
        forward_type (str): See :func:`parse_forward_type`. Default: ``v2``.
        mlp_ratio (float): Default: 4.
        mlp_act_layer (str): Default: ``gelu``.
        mlp_drop_rate (float): Default: 0.
        gmlp (bool): Default: False.
        drop_path_rate (float): Default: 0.1.
        downsample_version (str): v1, v2, v3 or none. Default: ``v2``.
        patchembed_version (str): v1 or v2. Default: ``v1``.
        use_checkpoint (bool): Default: False; Swin's ``with_cp`` is the same.
        patch_size (int): Default: 4.
        in_chans (int): Default: 3; Swin's ``in_channels`` is the same.
        num_classes (int): Accepted and unused: a backbone has no classifier.
        patch_norm (bool): Default: True.
        posembed (bool): Default: False.
        imgsize (int): Side of the images that the position embedding is made for. Default: 224.
        post_norm (bool): Default: False.
        frozen_stages, norm_eval, init_cfg: As in :class:`VSSMBackbone`.
    """

    def __init__(
        self,
        out_indices=(0, 1, 2, 3),
        pretrained=None,
        norm_layer='ln',
        depths=(2, 2, 9, 2),
        dims=(96, 192, 384, 768),
        ssm_d_state=16,
        ssm_ratio=2.0,
        ssm_dt_rank='auto',
        ssm_act_layer='silu',
        ssm_conv=3,
        ssm_conv_bias=True,
        ssm_drop_rate=0.0,
        ssm_init='v0',
        forward_type='v2',
        mlp_ratio=4.0,
        mlp_act_layer='gelu',
        mlp_drop_rate=0.0,
        gmlp=False,
        drop_path_rate=0.1,
        downsample_version='v2',
        patchembed_version='v1',
        use_checkpoint=False,
        patch_size=4,
        in_chans=3,
        num_classes=1000,
        patch_norm=True,
        posembed=False,
        imgsize=224,
        post_norm=False,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
        ssm_rank_ratio=None,
        in_channels=None,
        with_cp=False,
        **inherited,
    ):
        unknown = sorted(set(inherited) - set(_SWIN_KEYS))
        if unknown:
            raise TypeError(
                f'MM_VSSM has no option {", ".join(unknown)}, and Swin, whose keys it ignores, has none either'
            )
        ignored = list(inherited)
        if inherited and _is_of_swin(init_cfg):
            ignored.append('init_cfg')
            init_cfg = None
        if pretrained == '':
            ignored.append('pretrained (empty: the weights are random)')
        elif pretrained is not None:
            if init_cfg is not None:
                raise ValueError('pretrained and init_cfg are both given, expected one of them')
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        if ssm_rank_ratio is not None:
            check_number('ssm_rank_ratio', ssm_rank_ratio, low=-1)
            check_number('ssm_ratio', ssm_ratio, low=0)
            if 0 < ssm_rank_ratio < ssm_ratio:
                raise ValueError(
                    f'ssm_rank_ratio is {ssm_rank_ratio}, below ssm_ratio {ssm_ratio}, which no published model has'
                )
            ignored.append('ssm_rank_ratio')
        if ignored:
            print_log(f'{type(self).__name__} ignores {", ".join(ignored)}', logger='current')
        for name, value in (('use_checkpoint', use_checkpoint), ('with_cp', with_cp)):
            check_bool(name, value)
        check_int('ssm_conv', ssm_conv, -1)
        arch = dict(
            dims=dims,
            depths=depths,
            in_channels=in_chans if in_channels is None else in_channels,
            patch_size=patch_size,
            patch_norm=patch_norm,
            pos_embed=posembed,
            img_size=imgsize,
            post_norm=post_norm,
            norm_layer=_lower('norm_layer', norm_layer),
            stem=_translate('patchembed_version', patchembed_version, _STEMS),
            downsample=_translate('downsample_version', downsample_version, _DOWNSAMPLES),
            ssm_init=_translate('ssm_init', ssm_init, _SSM_INITS),
            d_state=ssm_d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=ssm_dt_rank,
            act=_lower('ssm_act_layer', ssm_act_layer),
            d_conv=max(ssm_conv, 1),
            conv_bias=ssm_conv_bias,
            dropout=ssm_drop_rate,
            mlp='gmlp' if gmlp else 'mlp',
            mlp_ratio=mlp_ratio,
            mlp_act=_lower('mlp_act_layer', mlp_act_layer),
            mlp_dropout=mlp_drop_rate,
            **parse_forward_type(forward_type),
        )
        super().__init__(
            arch=arch,
            out_indices=out_indices,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            with_cp=use_checkpoint or with_cp,
            norm_eval=norm_eval,
            init_cfg=init_cfg,
        )


@register_backbone
class MMDET_VSSM(MM_VSSM):
    """The class of January 2024, which knew the vanilla model only: :class:`MM_VSSM` with that for its default.

    A config that names none of ``ssm_*``, ``forward_type``, ``downsample_version`` and ``patchembed_version`` means the
    vanilla model, and its ``mlp_ratio`` is Swin's.
    """

    def __init__(self, **options):
        later = ('forward_type', 'downsample_version', 'patchembed_version')
        if not any(name in later or name.startswith('ssm_') for name in options):
            if options.pop('mlp_ratio', 0) > 0:
                print_log(f'{type(self).__name__} ignores mlp_ratio: the vanilla model has no MLP', logger='current')
            options.update(mlp_ratio=0.0, forward_type='v0', downsample_version='v1', patchembed_version='v1')
        super().__init__(**options)


@register_backbone
class MMSEG_VSSM(MMDET_VSSM):
    """:class:`MMDET_VSSM` by its name in segmentation."""


def _is_of_swin(init_cfg) -> bool:
    """Whether an ``init_cfg`` is what a config inherits from Swin's: weights of a file whose name begins with swin."""
    checkpoint = init_cfg.get('checkpoint') if isinstance(init_cfg, dict) else None
    return isinstance(checkpoint, str) and PurePosixPath(checkpoint).name.startswith('swin')


def _lower(name: str, value) -> str:
    if not isinstance(value, str):
        raise TypeError(f'{name} is {value!r}, expected a string')
    return value.lower()


def _translate(name: str, value: str, table: dict) -> str:
    if not isinstance(value, str) or value not in table:
        raise ValueError(f'{name} is {value!r}, expected one of {", ".join(table)}')
    return table[value]
