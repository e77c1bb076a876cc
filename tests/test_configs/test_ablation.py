"""The ablations are the published ones, and differ from their base in what their name says."""

import json
import re

import pytest
import yaml

from tests.test_configs.zoo import ROOT, ablation_paths, read

ROWS = yaml.safe_load((ROOT / 'configs/ablation/metafile.yml').read_text())['Models']
PUBLISHED = json.loads((ROOT / 'tests/data/ablations.json').read_text())
KEYWORDS = dict(
    embed_dim='dims', ssm_forwardtype='forward_type', downsample='downsample_version', patchembed='patchembed_version'
)


def test_all_are_there_once():
    assert sorted(row['Metadata']['Published Config'] for row in ROWS) == sorted(PUBLISHED) and len(PUBLISHED) == 33


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row['Name'])
def test_options_are_the_published_ones(row):
    path = ROOT / row['Config']
    backbone = read(path).model.backbone
    for name, value in PUBLISHED[row['Metadata']['Published Config']].items():
        if name != 'name':
            assert backbone[KEYWORDS.get(name, name)] == (tuple(value) if isinstance(value, list) else value), name
    assert backbone.type == 'mmvmamba.MM_VSSM' and len(path.read_text().splitlines()) <= 6


# what a part of a name stands for
MEANINGS = {
    r's1l\d': dict(ssm_ratio=1.0),
    r's1hl\d': dict(ssm_ratio=1.5),
    r's2l\d': dict(ssm_ratio=2.0),
    r's2hl\d': dict(ssm_ratio=2.5),
    r'ds(\d+)': dict(ssm_d_state=int),
    r'mlp(\d)': dict(mlp_ratio=float),
    r'init-(v\d)': dict(ssm_init=str),
    'nodw': dict(ssm_conv=-1),
    'gate': dict(forward_type='v05'),
    'bidi': dict(forward_type='v052d_noz'),
    'unidi': dict(forward_type='v051d_noz'),
    'cascade2d': dict(forward_type='v052dc_noz'),
    r'(on\w+)': dict(forward_type='v05_{}_noz'.format),
    r'(gelu|relu)': dict(ssm_act_layer=str),
    'posembed': dict(posembed=True),
}


@pytest.mark.parametrize('path', [path for path in ablation_paths() if '-v0-' not in path.stem], ids=lambda p: p.stem)
def test_a_name_says_what_changes(path):
    cfg = read(path)
    base = read(path.parent / '_base_/vmamba-tiny-s1l8.py').model.backbone
    expected = dict(base, depths=(2, 2, int(re.search(r'-s\dh?l(\d)', path.stem)[1]), 2))
    parts = path.stem.removeprefix('vmamba-tiny-').removesuffix('_8xb128_in1k').replace('init-v', 'init_v').split('-')
    for part in parts:
        matches = [(re.fullmatch(pattern, part.replace('_v', '-v')), value) for pattern, value in MEANINGS.items()]
        ((match, meaning),) = [(match, value) for match, value in matches if match]
        expected.update({name: value(match[1]) if callable(value) else value for name, value in meaning.items()})
    assert dict(cfg.model.backbone) == expected
    assert (cfg.optim_wrapper.paramwise_cfg.custom_keys.get('pos_embed') is not None) == ('posembed' in path.stem)


def test_ablations_of_the_vanilla_model_change_the_kernel_only():
    paths = [path for path in ablation_paths() if '-v0-' in path.stem]
    assert len(paths) == 6
    for path in paths:
        change = path.stem.removeprefix('vmamba-tiny-v0-').removesuffix('_8xb128_in1k')
        base = dict(read(path.parent / '_base_/vmamba-tiny-v0.py').model.backbone)
        if change != 'baseline':
            base.update(zip(('forward_type', 'norm_layer'), change.split('-')))
        assert dict(read(path).model.backbone) == base
