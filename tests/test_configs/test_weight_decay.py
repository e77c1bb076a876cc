"""Which weights decay: the published recipes' rules, applied to the published names and shapes."""

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmvmamba import VSSMBackbone
from tests.test_configs.zoo import arch_of, config_paths, read

NAMES = {'tiny-v0': 'vanilla_vmamba_tiny', 'tiny-s2l5': 'vmamba_tiny_s2l5', 'tiny-s1l8': 'vmamba_tiny_s1l8'}
CLASSIFIERS = [path for path in config_paths('vmamba-tiny-*_8xb128_in1k') if arch_of(path) in NAMES]
DETECTORS = config_paths('mask-rcnn_vmamba-t-*_fpn_1x_coco')
SEGMENTORS = config_paths('vmamba-tiny-*_4xb4-160k_ade20k-512x512')


def decaying(model, cfg) -> set:
    """Names of the weights that a config's optimizer decays."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optim_wrapper(model, dict(cfg.optim_wrapper)).optimizer.param_groups
    assert sum(len(group['params']) for group in groups) == len(names)
    return {names[id(parameter)] for group in groups if group['weight_decay'] > 0 for parameter in group['params']}


@pytest.mark.parametrize('path', CLASSIFIERS, ids=arch_of)
def test_classifiers(path, tables):
    """Everything but what is flat or called bias, as in Swin's training code, which the published one is."""
    arch = arch_of(path)
    model = nn.ModuleDict(dict(backbone=VSSMBackbone(arch, (3,)), head=nn.ModuleDict(dict(fc=nn.Linear(768, 1000)))))
    expected = set()
    for name, shape in tables['state_dicts'][NAMES[arch]]:
        if len(shape) > 1 and not name.endswith('.bias'):
            expected.add('head.fc.weight' if name == 'classifier.head.weight' else f'backbone.{name}')
    assert decaying(model, read(path)) == expected
    first = 'backbone.layers.0.blocks.0.op.'  # these two decay, though Mamba's own code marks A_logs and Ds not to
    assert {first + 'A_logs', first + 'dt_projs_bias'} <= expected and first + 'Ds' not in expected


def test_the_skip_connections_of_mamba2_decay():
    """They are not flat, (4, R, P), and the published rule goes by shapes."""
    (path,) = config_paths('vmamba-tiny-m2_8xb128_in1k')
    model = nn.ModuleDict(dict(backbone=VSSMBackbone('tiny-m2', (3,))))
    names = decaying(model, read(path))
    assert {f'backbone.layers.0.blocks.0.op.{name}' for name in ('Ds', 'A_logs', 'conv2d.1.weight')} <= names
    assert names == {name for name, value in model.named_parameters() if value.dim() > 1 and not name.endswith('.bias')}


@pytest.mark.parametrize('path', [*DETECTORS, *SEGMENTORS], ids=lambda path: path.stem)
def test_detectors_and_segmentors(path, tables):
    """Everything but what has ``norm`` in its name: biases and Ds decay, and so does the first norm of the stem."""
    arch = arch_of(path)
    names = [name for name, _ in tables['state_dicts'][NAMES[arch]] if not name.startswith('classifier.')]
    expected = {f'backbone.{name}' for name in names if 'norm' not in name}
    assert decaying(nn.ModuleDict(dict(backbone=VSSMBackbone(arch))), read(path)) == expected
    assert {'backbone.patch_embed.2.weight', 'backbone.layers.0.blocks.0.op.Ds'} <= expected


def test_every_tiny_arch_is_covered():
    for paths in (CLASSIFIERS, DETECTORS, SEGMENTORS):
        assert sorted(map(arch_of, paths)) == sorted(NAMES)
