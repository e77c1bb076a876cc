"""The published spelling: forward_type strings and keyword names."""

import itertools

import pytest
import torch

from mmvmamba import MM_VSSM, VSSMBackbone
from mmvmamba.models import parse_forward_type


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
    ],
)
def test_parse_forward_type(text, expected):
    defaults = dict(scan_mode='cross2d', gate='silu', out_norm='ln', out_act=False, force_fp32=False)
    assert parse_forward_type(text) == {**defaults, **expected}


def test_postfixes_in_any_order():
    results = [
        parse_forward_type('_'.join(('v03',) + order)) for order in itertools.permutations(('noz', 'oact', 'no32'))
    ]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    'text', ['', 'v9', 'v05noz', 'v05_', 'v05_nozz', 'v05_noz_noz', 'v05_noz_nozact', 'm1_noz', 'v05_onnone_oncnorm']
)
def test_leftovers_raise(text):
    with pytest.raises(ValueError, match='forward_type is'):
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
        (dict(posembed=True), ('posembed',)),
        (dict(patch_size=8), ('patch_size', '8')),
        (dict(pretrained='a.pth', init_cfg=dict(type='Pretrained', checkpoint='b.pth')), ('pretrained', 'init_cfg')),
    ],
)
def test_bad_keywords(kwargs, words):
    with pytest.raises(ValueError) as raised:
        MM_VSSM(dims=16, depths=(1, 1), out_indices=(0,), **kwargs)
    assert all(word in str(raised.value) for word in words)


def test_unknown_keyword():
    with pytest.raises(TypeError, match='ssm_dstate'):
        MM_VSSM(ssm_dstate=1)
