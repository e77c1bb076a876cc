"""Parameters and FLOPs by the published rule, against the published figures."""

import logging
import re

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from mmengine.config import Config

from mmvmamba.models import ARCHS
from tests.test_configs.zoo import ROOT, arch_of, config_paths, read
from tests.test_tools.conftest import load_tool

get_flops = load_tool('analysis/get_flops.py')

# published millions of parameters and GFLOPs at 1280x800, and parameters and GFLOPs at 2048x512
DETECTORS = {
    't-v0': ('42.4', 285.9),
    's-v0': ('63.9', 400.3),
    'b-v0': ('95.6', 539.8),
    't-s2l5': ('50.2', 270.2),
    't-s1l8': ('49.755', 271.2),
    's-s2l15': ('69.654', 348.9),
    'b-s2l15': ('108', 485.5),
}
SEGMENTORS = {
    'tiny-v0': (54_546_956, 963.9),
    'small-v0': (76_070_924, 1081.0),
    'base-v0': (109_765_548, 1225.9),
    'tiny-s2l5': (62_359_340, 947.8),
    'tiny-s1l8': (61_902_572, 948.8),
    'small-s2l15': (81_801_260, 1028.4),
    'base-s2l15': (122_069_292, 1170.3),
}


def measure(path, shape=None):
    """(parameters, FLOPs) of a config."""
    cfg = read(path)
    analysis = get_flops.count(cfg, shape or get_flops.default_shape(cfg))
    return get_flops.count_parameters(analysis._model), analysis.total()


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def test_scan_formula():
    # one image of 3x4 pixels, 2 channels on 4 routes, rank 1, state 1: 288 + 96 for projections, 864 + 96 for the scan
    assert get_flops.scan_flops((1, 2, 3, 4), 1, 1) == 288 + 96 + 864 + 96
    assert get_flops.selective_scan_flops(2, 8, 12, 16) == 2 * (9 * 8 * 12 * 16 + 8 * 12)


def _classifiers():
    for path in config_paths('vmamba-*_8xb128_in1k'):
        slow = not arch_of(path).startswith('tiny')
        yield pytest.param(path, id=arch_of(path), marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize('path', _classifiers())
def test_classifiers(path, tables):
    size, family = arch_of(path).split('-')
    name = f'vanilla_vmamba_{size}' if family == 'v0' else f'vmamba_{size}_{family}'
    parameters, flops = measure(path)
    assert parameters == tables['variants'][name]['params']
    if family == 'm2':  # the published count leaves out the scan, and rounds that of its projections
        arch = ARCHS[f'{size}-m2']
        stages = [(depth, arch['dims'] * 2**i, 56 // 2**i) for i, depth in enumerate(arch['depths'])]
        flops -= sum(depth * get_flops.ssd_flops(1, side**2, dim // 16, 16, 64) for depth, dim, side in stages)
    limit = dict(v0=1e-3, m2=3e-5).get(family, 1e-12)
    assert abs(flops / tables['variants'][name]['flops_224'] - 1) < limit


@pytest.mark.slow
@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(name):
    parameters, flops = measure(ROOT / f'configs/detection/mask-rcnn_vmamba-{name}_fpn_1x_coco.py')
    expected_parameters, expected_flops = DETECTORS[name]
    digits = len(expected_parameters.partition('.')[2])
    assert f'{parameters / 1e6:.{digits}f}' == expected_parameters
    assert abs(flops / 1e9 / expected_flops - 1) < 5e-3


def segmentor(name):
    """Path of a UperNet config."""
    return ROOT / f'configs/segmentation/vmamba-{name}-in1k-pre_upernet_4xb4-160k_ade20k-512x512.py'


@pytest.mark.slow
@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentors(name):
    parameters, flops = measure(segmentor(name))
    assert parameters == SEGMENTORS[name][0]
    assert abs(flops / 1e9 / SEGMENTORS[name][1] - 1) < 5e-3


@pytest.mark.parametrize('name', [name for name in SEGMENTORS if name.startswith('tiny')])
def test_segmentors_at_small_size(name):
    """Every layer's FLOPs grow with the pixels, but those of the pooled pyramid, which are constant: two sizes do."""
    (parameters, small), (_, large) = (measure(segmentor(name), (64, width)) for width in (64, 128))
    flops = small + (large - small) * (512 * 2048 - 64 * 64) // (64 * 64)
    assert parameters == SEGMENTORS[name][0]
    assert abs(flops / 1e9 / SEGMENTORS[name][1] - 1) < 5e-3


def demo(pattern):
    """Path of a demo config."""
    (path,) = (ROOT / 'configs/demo').glob(f'{pattern}.py')
    return path


DEMO = dict(
    classification=demo('vmamba-nano_1xb*_digits-32px'),
    detection=demo('mask-rcnn_vmamba-nano_fpn_*'),
    segmentation=demo('vmamba-nano_upernet_*'),
)


def test_flops_grow_with_the_number_of_pixels():
    head = 256 * 10
    small, large = (measure(DEMO['classification'], (side, side))[1] - head for side in (64, 128))
    assert large == 4 * small


@pytest.mark.parametrize('task', DEMO)
def test_command_line(task, capsys):
    path = str(DEMO[task])
    assert get_flops.main([path, '--shape', '64', '96', '--by-module']) == 0
    out = capsys.readouterr().out
    assert '1 x 3 x 64 x 96' in out and 'backbone.layers' in out
    assert not re.search(r'counted as 0: .*(conv|linear|matmul|scan)', out)
    parameters = int(re.search(r'parameters: ([\d,]+)', out)[1].replace(',', ''))
    model = get_flops.build_model(Config.fromfile(path))
    assert parameters == sum(value.numel() for value in model.parameters())


def test_every_module_counts_once():
    cfg = Config.fromfile(DEMO['classification'])
    analysis = get_flops.count(cfg, (64, 64))
    modules = analysis.by_module()
    assert modules[''] == modules['backbone'] + modules['neck'] + modules['head'] == analysis.total()
    operators = analysis.by_operator('backbone.layers.0.blocks.0.op')
    assert operators['scan_routes'] == get_flops.scan_flops((1, 32, 16, 16), 2, 1)


def test_cascade_is_counted():
    cfg = Config.fromfile(DEMO['classification'])
    cfg.model.backbone.arch = dict(dims=16, depths=(1,), scan_mode='cascade2d', downsample='conv3')
    cfg.model.backbone.out_indices = (0,)
    cfg.model.head.in_channels = 16
    operators = get_flops.count(cfg, (64, 64)).by_operator()
    # rows and columns of 16x16, both directions: 2 passes of 2 * 16 channels over 256 pixels
    passes = 2 * get_flops.selective_scan_flops(1, 32, 256, 1)
    projections = 4 * 256 * (16 * (1 + 2) + 16)  # 4 routes of 256 pixels: 16 channels to dt, B and C, and dt to 16
    norm = FlopCountAnalysis(torch.nn.LayerNorm(16, elementwise_affine=False), torch.rand(1, 16, 16, 16)).total()
    assert operators['scan_routes'] == passes + projections + 2 * norm


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['nowhere.py'], "config 'nowhere.py' is not a file"),
        (['{config}', '--shape', '4'], '--shape is 4, expected'),
        (['{config}', '--shape', '64', '64', '3'], '--shape is'),
        (['{other}'], 'default_scope None'),
    ],
    ids=['no config', 'too small', 'too many', 'other scope'],
)
def test_errors(arguments, words, tmp_path, capsys):
    (tmp_path / 'other.py').write_text('model = dict()\n')
    places = dict(config=DEMO['classification'], other=tmp_path / 'other.py')
    assert get_flops.main([argument.format(**places) for argument in arguments]) == 2
    assert words in capsys.readouterr().err
