"""The published code's spelling: ``forward_type`` strings and the keyword names of its ``MM_VSSM``."""

from mmvmamba.layers.options import check_int
from mmvmamba.registry import register_backbone

from .vssm import VSSMBackbone

# version: (scan_mode, force_fp32); versions differ further only in the kernel they used
_VERSIONS = dict(
    v0=('cross2d', True),
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
_STEMS = dict(v1='patch4', v2='conv3x2')
_DOWNSAMPLES = dict(v1='merge', v2='conv2', v3='conv3')
_SSM_INITS = dict(v0='mamba', v1='randn', v2='zeros')


def parse_forward_type(forward_type: str) -> dict:
    """Translate a ``forward_type`` of the published code, such as ``v05_noz``; postfixes may stand in any order.

    Args:
        forward_type (str): A version (v0, v01 to v05, v051d, v052d, v052dc, v2, v3, m0) and postfixes, joined by ``_``.

    Returns:
        dict: ``scan_mode``, ``gate``, ``out_norm``, ``out_act`` and ``force_fp32`` for an arch dict; of m0 ``core``.

    Raises:
        TypeError: If ``forward_type`` is not a string.
        ValueError: If a part is unknown, or two postfixes contradict each other.
    """
    if not isinstance(forward_type, str):
        raise TypeError(f'forward_type is {forward_type!r}, expected a string such as "v05_noz"')
    version, *postfixes = forward_type.split('_')
    if version not in _VERSIONS:
        raise ValueError(
            f'forward_type is {forward_type!r}: unknown version {version!r}, expected one of {", ".join(_VERSIONS)}'
        )
    scan_mode, force_fp32 = _VERSIONS[version]
    options = dict(scan_mode=scan_mode, gate='silu', out_norm='ln', out_act=False, force_fp32=force_fp32)
    if version == 'm0':
        options['core'] = 'ssd'
    given: dict = {}
    for postfix in postfixes:
        if postfix not in _POSTFIXES:
            raise ValueError(
                f'forward_type is {forward_type!r}: unknown postfix "_{postfix}", expected some of '
                f'{", ".join("_" + name for name in _POSTFIXES)}'
            )
        option, value = _POSTFIXES[postfix]
        if option in given:
            raise ValueError(f'forward_type is {forward_type!r}: "_{postfix}" and "_{given[option]}" both set {option}')
        given[option] = postfix
        options[option] = value
    return options


@register_backbone
class MM_VSSM(VSSMBackbone):
    """:class:`VSSMBackbone` under the keyword names of the published code, so that its config files run unchanged.

    Args:
        out_indices (Sequence[int]): Stages whose maps are returned. Default: (0, 1, 2, 3).
        pretrained (str, optional): Path or URL of a checkpoint, as ``init_cfg`` of :class:`VSSMBackbone`.
        norm_layer (str): ln, ln2d or bn, in any case. Default: ``ln``.
        depths (Sequence[int]): Blocks of each stage. Default: (2, 2, 9, 2).
        dims (int | Sequence[int]): Channels. Default: (96, 192, 384, 768).
        ssm_d_state (int): Default: 16.
        ssm_ratio (float): Default: 2.
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
        downsample_version (str): v1, v2 or v3. Default: ``v2``.
        patchembed_version (str): v1 or v2. Default: ``v1``.
        use_checkpoint (bool): Default: False.
        patch_size (int): Only 4.
        in_chans (int): Default: 3.
        num_classes (int): Accepted and unused: a backbone has no classifier.
        patch_norm (bool): Only True.
        posembed (bool): Only False.
        imgsize (int): Accepted and unused without position embedding.
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
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ):
        for name, value, only in (
            ('patch_size', patch_size, 4),
            ('patch_norm', patch_norm, True),
            ('posembed', posembed, False),
        ):
            if value != only:
                raise ValueError(f'{name} is {value!r}; no published model has it, and only {only!r} is supported')
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError('pretrained and init_cfg are both given, expected one of them')
            init_cfg = dict(type='Pretrained', checkpoint=pretrained)
        check_int('ssm_conv', ssm_conv, -1)
        arch = dict(
            dims=dims,
            depths=depths,
            in_channels=in_chans,
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
            with_cp=use_checkpoint,
            norm_eval=norm_eval,
            init_cfg=init_cfg,
        )


def _lower(name: str, value) -> str:
    if not isinstance(value, str):
        raise TypeError(f'{name} is {value!r}, expected a string')
    return value.lower()


def _translate(name: str, value: str, table: dict) -> str:
    if not isinstance(value, str) or value not in table:
        raise ValueError(f'{name} is {value!r}, expected one of {", ".join(table)}')
    return table[value]
