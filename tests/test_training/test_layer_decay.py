"""Layer-wise decay of the learning rate: mmpretrain's own constructor, and ours for all three codebases."""

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from mmvmamba.models import VSSMBackbone
from mmvmamba.registry import OPTIM_WRAPPER_CONSTRUCTORS

ARCH = dict(dims=8, depths=(1, 2, 1))
OURS = 'mmvmamba.LayerDecayOptimWrapperConstructor'
OPTIMIZER = dict(type='AdamW', lr=0.1, weight_decay=0.05)


class Detector(BaseModel):
    def __init__(self, **options):
        super().__init__()
        self.backbone = VSSMBackbone(ARCH, out_indices=(0, 1, 2), **options)
        self.neck = torch.nn.Conv2d(8, 8, 1)

    def forward(self, inputs, **_):
        return self.backbone(inputs)


def rates(model, constructor=OURS, **paramwise):
    paramwise = dict(layer_decay_rate=0.5, **paramwise)
    config = dict(type='OptimWrapper', optimizer=OPTIMIZER, constructor=constructor, paramwise_cfg=paramwise)
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    found = {id(group['params'][0]): group for group in groups}
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_layers_of_the_backbone():
    model = VSSMBackbone(ARCH, out_indices=(0, 1, 2))
    layers = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.') for name in model.state_dict()}
    assert {total for _, total in layers.values()} == {6}
    for start, layer in {
        'patch_embed': 0,
        'layers.0.blocks.0': 1,
        'layers.0.downsample': 1,
        'layers.1.blocks.0': 2,
        'layers.1.blocks.1': 3,
        'layers.1.downsample': 3,
        'layers.2.blocks.0': 4,
        'outnorm0': 5,
        'outnorm2': 5,
    }.items():
        found = {depth for name, (depth, _) in layers.items() if name.startswith(f'{start}.')}
        assert found == {layer}, start
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (5, 6)
    assert VSSMBackbone(ARCH, out_indices=(1,)).get_layer_depth('outnorm1.weight') == (4, 5)


def test_rates_and_other_rules():
    found = rates(Detector(frozen_stages=0), norm_decay_mult=0.0, custom_keys={'neck': dict(lr_mult=2.0)})
    assert not any(name.startswith('backbone.patch_embed') for name in found)
    assert found['backbone.layers.0.blocks.0.op.A_logs']['lr'] == pytest.approx(0.1 * 0.5**4)
    assert found['backbone.layers.1.downsample.1.weight']['lr'] == pytest.approx(0.1 * 0.5**2)
    assert found['backbone.outnorm0.weight']['lr'] == 0.1 and found['backbone.outnorm0.weight']['weight_decay'] == 0
    assert found['backbone.layers.2.blocks.0.op.in_proj.weight']['weight_decay'] == 0.05
    assert found['neck.weight']['lr'] == 0.2


def test_classifier_has_the_rates_of_mmpretrain():
    import mmpretrain.models  # noqa: F401

    backbone = dict(type='mmvmamba.VSSMBackbone', arch=ARCH, out_indices=(2,))
    head = dict(type='LinearClsHead', num_classes=3, in_channels=32)
    neck = dict(type='GlobalAveragePooling')
    model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, neck=neck, head=head, _scope_='mmpretrain'))
    theirs = rates(model, 'mmpretrain.LearningRateDecayOptimWrapperConstructor')
    ours = rates(model)
    assert theirs.keys() == ours.keys()
    assert all(ours[name]['lr'] == pytest.approx(group['lr']) for name, group in theirs.items())


def test_a_step_moves_each_layer_by_its_rate():
    model = Detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    paramwise = dict(layer_decay_rate=0.5)
    optimizer = dict(type='SGD', lr=0.1)
    wrapper = build_optim_wrapper(model, dict(optimizer=optimizer, constructor=OURS, paramwise_cfg=paramwise))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wrapper.step()
    moved = {name: (before[name] - value).mean().item() for name, value in model.named_parameters()}
    assert moved['neck.weight'] == pytest.approx(0.1, rel=1e-3)
    assert moved['backbone.patch_embed.0.weight'] == pytest.approx(0.1 * 0.5**5, rel=1e-3)


@pytest.mark.parametrize(
    ('paramwise', 'error', 'words'),
    [
        (dict(), ValueError, 'expected layer_decay_rate'),
        (dict(layer_decay_rate='0.5'), TypeError, "layer_decay_rate is '0.5'"),
        (dict(layer_decay_rate=1.5), ValueError, 'layer_decay_rate is 1.5'),
    ],
)
def test_bad_rates_are_refused(paramwise, error, words):
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get('LayerDecayOptimWrapperConstructor')
    with pytest.raises(error, match=words):
        constructor(dict(type='OptimWrapper', optimizer=OPTIMIZER), paramwise)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match='no module of Conv2d has get_layer_depth'):
        rates(torch.nn.Conv2d(3, 3, 1))
