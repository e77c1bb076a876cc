"""The published spelling: forward_type strings and keyword names."""

import itertools

import pytest
import torch

from mmvmamba import MM_VSSM, VSSMBackbone
from mmvmamba.models import MMDET_VSSM, MMSEG_VSSM, parse_forward_type, upstream


@pytest.mark.parametrize(
    'text, expected',
    [
        ('v0', dict(gate='silu', force_fp32=True)),
        ('v02_no32', dict(gate='silu', force_fp32=False)),
        ('v05_noz', dict(gate='none')),
        ('v05_nozact', dict(gate='linear')),
        ('v051d_noz', dict(gate='none', scan_mode='unidi')),
        ('v052d_noz', dict(gate='none', scan_mode='bidi')),
        ('v052dc_noz', dict(gate='none', scan_mode='cascade2d')),
        ('v05_onnone_noz', dict(gate='none', out_norm='none')),
        ('v05_ondwconv3_noz', dict(gate='none', out_norm='dwconv3')),
        ('v05_oncnorm_noz', dict(gate='none', out_norm='cnorm')),
        ('v05_onsoftmax_noz', dict(gate='none', out_norm='softmax')),
        ('v05_onsigmoid_noz_oact', dict(gate='none', out_norm='sigmoid', out_act=True)),
        ('v2', dict(force_fp32=True)),
        ('v3_noz', dict(gate='none')),
        ('v0seq', dict(force_fp32=True)),
        ('v1', dict(force_fp32=True)),
        ('v4', dict()),
        ('v31d', dict(scan_mode='unidi')),
        ('v32dnoz', dict(scan_mode='bidi', gate='none')),
        ('v32dc_noz', dict(scan_mode='cascade2d', gate='none')),
        ('v3noz', dict(gate='none')),
        ('v2nozact', dict(gate='linear', force_fp32=True)),
        ('v2no32nozoact', dict(gate='none', out_act=True)),
        ('v05oncnorm_noz', dict(gate='none', out_norm='cnorm')),
        ('v052doncnorm', dict(scan_mode='bidi', out_norm='cnorm')),
        ('v3softmaxnoz', dict(gate='none', out_norm='softmax')),
        ('v2none', dict(out_norm='none', force_fp32=True)),
        ('v4dwconv3noz', dict(gate='none', out_norm='dwconv3')),
        ('v01sigmoid', dict(out_norm='sigmoid', force_fp32=True)),
    ],
)
def test_parse_forward_type(text, expected):
    defaults = dict(scan_mode='cross2d', gate='silu', out_norm='ln', out_act=False, force_fp32=False)
    assert parse_forward_type(text) == {**defaults, **expected}


def test_postfixes_in_any_order():
    results = [
        parse_forward_type(joint.join(('v03',) + order))
        for order in itertools.permutations(('noz', 'oact', 'no32'))
        for joint in ('_', '')
    ]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    'text',
    [
        '',
        'v9',
        'm1_noz',
        'v05_',
        'v05__noz',
        'v05_softmax',
        'v05_nozz',
        'v05_noz_noz',
        'v05_noz_nozact',
        'v05noznozact',
        'v05_onnone_oncnorm',
        'v2softmax_onsoftmax',
        'v0' + 'noz' * 10000,
    ],
)
def test_leftovers_raise(text):
    with pytest.raises(ValueError, match='forward_type is'):
        parse_forward_type(text)


def test_two_readings_are_both_named(monkeypatch):
    """No two of today's names make such a spelling; the next one might."""
    monkeypatch.setitem(upstream._VERSIONS, 'v3no', ('cross2d', False))
    monkeypatch.setitem(upstream._BARE_POSTFIXES, 'z', ('gate', 'none'))
    with pytest.raises(ValueError, match="forward_type is 'v3noz', which can be read as v3no_z or v3_noz"):
        parse_forward_type('v3noz')


@pytest.mark.parametrize('text', ['xv1a', 'xv2a', 'xv3a', 'xv1a_no32'])
def test_what_does_not_run_in_the_published_code(text):
    with pytest.raises(ValueError, match=f"'{text}': the variants xv1a to xv3a do not run in the published code"):
        parse_forward_type(text)


def test_same_model_under_both_names():
    torch.manual_seed(0)
    ours = VSSMBackbone(dict(dims=16, depths=(1, 1), drop_path_rate=0.1), out_indices=(0, 1)).eval()
    torch.manual_seed(0)
    theirs = MM_VSSM(
        out_indices=(0, 1),
        dims=16,
        depths=(1, 1),
        ssm_d_state=1,
        ssm_ratio=1.0,
        ssm_conv_bias=False,
        forward_type='v05_noz',
        mlp_ratio=4.0,
        downsample_version='v3',
        patchembed_version='v2',
        norm_layer='ln2d',
    ).eval()
    assert ours.arch == theirs.arch
    x = torch.randn(1, 3, 32, 32)
    for first, second in zip(ours(x), theirs(x)):
        assert torch.equal(first, second)


def test_layouts_give_equal_numbers():
    x = torch.randn(1, 3, 32, 32)
    outs = []
    for norm_layer in ('ln', 'LN2D'):
        torch.manual_seed(0)
        outs.append(MM_VSSM(dims=16, depths=(1, 1), out_indices=(1,), norm_layer=norm_layer).eval()(x)[0])
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    'kwargs, words',
    [
        (dict(downsample_version='v9'), ('downsample_version', 'v9')),
        (dict(patchembed_version='v3'), ('patchembed_version', 'v3')),
        (dict(ssm_init='v5'), ('ssm_init', 'v5')),
        (dict(patch_size=7, patchembed_version='v2'), ('patch_size', '7', 'even')),
        (dict(ssm_ratio=0, mlp_ratio=0), ('ssm_ratio', 'mlp_ratio')),
        (dict(downsample_version='none'), ('dims', 'downsample none')),
        (dict(posembed=True, imgsize=3), ('img_size', '3', 'patch_size')),
        (dict(ssm_rank_ratio=1.0), ('ssm_rank_ratio', '1.0', 'ssm_ratio 2.0')),
        (dict(pretrained='a.pth', init_cfg=dict(type='Pretrained', checkpoint='b.pth')), ('pretrained', 'init_cfg')),
    ],
)
def test_bad_keywords(kwargs, words):
    with pytest.raises(ValueError) as raised:
        MM_VSSM(dims=16, depths=(1, 1), out_indices=(0,), **kwargs)
    assert all(word in str(raised.value) for word in words)


def test_unknown_keyword():
    with pytest.raises(TypeError, match='MM_VSSM has no option ssm_dstate, and Swin'):
        MM_VSSM(ssm_dstate=1, embed_dims=96)
    with pytest.raises(TypeError, match='embed_dims'):
        VSSMBackbone(embed_dims=96)


SWIN = dict(
    embed_dims=96,
    num_heads=[3, 6, 12, 24],
    window_size=7,
    qkv_bias=True,
    patch_norm=True,
    init_cfg=dict(type='Pretrained', checkpoint='https://example.org/swin_tiny_patch4_window7_224.pth'),
)
SMALL = dict(dims=16, depths=(1, 1), out_indices=(1,))


def test_swins_keys_are_ignored_and_named_once(monkeypatch):
    lines = []
    monkeypatch.setattr(upstream, 'print_log', lambda text, **_: lines.append(text))
    with torch.device('meta'):
        model = MM_VSSM(**SMALL, **SWIN, pretrained='', ssm_rank_ratio=2.0)
    (line,) = lines
    for name in ('embed_dims', 'num_heads', 'window_size', 'qkv_bias', 'init_cfg', 'pretrained', 'ssm_rank_ratio'):
        assert line.count(name) == 1
    assert 'patch_norm' not in line and model.init_cfg is None
    with torch.device('meta'):
        MM_VSSM(**SMALL)
    assert lines == [line]


def test_weights_of_ones_own_beside_swins_keys():
    own = dict(type='Pretrained', checkpoint='vssm.pth')
    with torch.device('meta'):
        assert MM_VSSM(**SMALL, **{**SWIN, 'init_cfg': own}).init_cfg == own
        assert MM_VSSM(**SMALL, **SWIN, pretrained='vssm.pth').init_cfg == own
        with pytest.raises(ValueError, match='pretrained and init_cfg are both given'):
            MM_VSSM(**SMALL, **{**SWIN, 'init_cfg': own}, pretrained='other.pth')


def test_swins_keys_that_mean_something_here():
    with torch.device('meta'):
        model = MM_VSSM(**SMALL, in_channels=6, with_cp=True, frozen_stages=1)
    assert model.arch.in_channels == 6 and model.layers[0].blocks[0].with_cp and model.frozen_stages == 1


@pytest.mark.parametrize('kind', [MMDET_VSSM, MMSEG_VSSM], ids=lambda kind: kind.__name__)
def test_the_first_class_is_the_vanilla_model(kind):
    with torch.device('meta'):
        theirs = kind(depths=(2, 2, 9, 2), dims=96, mlp_ratio=4, drop_path_rate=0.2, **SWIN)
        ours = VSSMBackbone('tiny-v0')
        later = kind(**SMALL, mlp_ratio=4, forward_type='v05_noz', downsample_version='v3')
    assert theirs.arch == ours.arch
    assert later.arch.mlp_ratio == 4 and later.arch.downsample == 'conv3'
