"""Every kind of file at every place that loads one: the backbone gets its weights, or an error names what is wrong."""

import argparse
from collections import OrderedDict

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint

from mmvmamba import VSSMBackbone
from mmvmamba.checkpoint import CheckpointError, read_checkpoint
from mmvmamba.training.loading import whole_models
from tests.test_checkpoint.test_checkpoint import ARCH, assert_loaded, backbone, official_weights, old_names
from tests.test_tools.conftest import load_tool

WEIGHTS = official_weights()
OTHER = official_weights(0.5)
HEAD = {'classifier.head.weight': 'head.fc.weight', 'classifier.head.bias': 'head.fc.bias'}


def of_mmengine(weights, prefix='backbone.', head=True):
    """The names of mmpretrain's classifier."""
    state = OrderedDict()
    for key, value in weights.items():
        if key in HEAD:
            if head:
                state[HEAD[key]] = value
        else:
            state[prefix + key.replace('classifier.norm.', 'outnorm1.')] = value
    return state


def prefixed(weights, prefix):
    return OrderedDict((prefix + key, value) for key, value in weights.items())


def with_counts(weights):
    counts = {'total_ops': torch.zeros(1), 'layers.0.blocks.0.total_params': torch.zeros(1)}
    return {**weights, **counts}


BARE = of_mmengine(WEIGHTS, prefix='', head=False)
# kind: (content, what is loaded or the words of the error)
KINDS = {
    'official': (dict(model=WEIGHTS, epoch=3), 'whole'),
    'official, EMA evaluated': (dict(model=OTHER, model_ema=WEIGHTS, max_accuracy_ema=82.0), 'whole'),
    'official, EMA not evaluated': (dict(model=WEIGHTS, model_ema=OTHER), 'whole'),
    'official, first names': (dict(model=old_names(WEIGHTS)), 'whole'),
    'official, bare': (WEIGHTS, 'whole'),
    'official, DDP': (dict(model=prefixed(WEIGHTS, 'module.')), 'whole'),
    'official, compiled': (dict(model=prefixed(WEIGHTS, '_orig_mod.')), 'whole'),
    'official, thop': (dict(model=with_counts(WEIGHTS)), 'whole'),
    'mmengine': (dict(state_dict=of_mmengine(WEIGHTS), meta={}), 'whole'),
    'mmengine, EMA': (dict(state_dict=of_mmengine(WEIGHTS), ema_state_dict=of_mmengine(OTHER)), 'whole'),
    'mmengine, bare': (of_mmengine(WEIGHTS), 'whole'),
    'a detector': (dict(state_dict={**of_mmengine(WEIGHTS, head=False), 'neck.w': torch.ones(3)}), 'backbone'),
    'a bare backbone': (BARE, 'backbone'),
    'timm': (dict(state_dict=OTHER, state_dict_ema=WEIGHTS), 'whole'),
    'self-distilled': (dict(student=OTHER, teacher=prefixed(BARE, 'encoder.')), 'backbone'),
    'a trainer': (dict(model_state=WEIGHTS, optimizer=dict(lr=1.0)), 'whole'),
    'restoration': (dict(params=OTHER, params_ema=WEIGHTS), 'whole'),
    'another arch': (dict(model=official_weights(arch=dict(depths=(1, 1)))), 'does not fit.*it has depths'),
    'another width': (dict(state_dict=of_mmengine(official_weights(arch=dict(dims=8)))), 'does not fit'),
    'another network': (dict(state_dict={'conv1.weight': torch.ones(3)}), 'no weights of a VMamba backbone'),
    'half of it': (dict(state_dict=dict(list(of_mmengine(WEIGHTS).items())[:20])), 'does not fit.*missing'),
    'an optimizer': (dict(optimizer=dict(lr=1.0), epoch=3), 'expected weights under one of'),
    'a Namespace': (dict(model=WEIGHTS, args=argparse.Namespace(lr=1.0)), 'clean_checkpoint.py'),
    'text': (None, 'is not a file of torch.save|cannot be read'),
}


def classifier():
    head = dict(type='LinearClsHead', num_classes=10, in_channels=32)
    one = dict(type='mmvmamba.VSSMBackbone', arch=dict(ARCH), out_indices=(1,))
    neck = dict(type='GlobalAveragePooling')
    return dict(type='ImageClassifier', backbone=one, neck=neck, head=head, _scope_='mmpretrain')


def build():
    import mmpretrain.models  # noqa: F401

    return MODELS.build(classifier())


def by_init_cfg(path, _):
    model = VSSMBackbone(dict(ARCH), out_indices=(1,), init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    return model


def by_mmengine(path, _):
    """What inferencers of mmdet and mmseg call."""
    model = build()
    load_checkpoint(model, path, map_location='cpu')
    return model


def by_runner(path, folder):
    """``load_from``, and ``mim test``."""
    runner = Runner(build(), work_dir=str(folder), experiment_name='places', log_level='ERROR')
    runner.load_checkpoint(path)
    return runner.model


def by_test(path, folder):
    with whole_models():
        return by_runner(path, folder)


def by_inferencer(path, _):
    from mmpretrain import ImageClassificationInferencer

    config = Config(
        dict(
            model=classifier(),
            test_dataloader=dict(
                dataset=dict(type='mmpretrain.CustomDataset', pipeline=[dict(type='mmpretrain.PackInputs')])
            ),
        )
    )
    return ImageClassificationInferencer(model=config, pretrained=path, device='cpu', classes=list('0123456789')).model


PLACES = dict(init_cfg=by_init_cfg, load=by_mmengine, runner=by_runner, test=by_test, inferencer=by_inferencer)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    for i, (content, _) in enumerate(KINDS.values()):
        path = folder / f'{i}.pth'
        path.write_text('no checkpoint') if content is None else torch.save(content, path)
    return {kind: str(folder / f'{i}.pth') for i, kind in enumerate(KINDS)}


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('kind', KINDS)
def test_nothing_is_random(kind, place, files, tmp_path):
    expected = KINDS[kind][1]
    if expected == 'backbone' and place == 'test':
        expected = 'weights of the model are not in.*head.fc'
    if expected not in ('whole', 'backbone'):
        with pytest.raises(CheckpointError, match=f'(?s){expected}'):
            PLACES[place](files[kind], tmp_path)
        return
    model = PLACES[place](files[kind], tmp_path)
    one = getattr(model, 'backbone', model)
    assert_loaded(one, {**WEIGHTS, 'outnorm1.weight': WEIGHTS['classifier.norm.weight']})
    assert torch.equal(one.outnorm1.weight, WEIGHTS['classifier.norm.weight'])
    if hasattr(model, 'head'):
        same = torch.equal(model.head.fc.weight, WEIGHTS['classifier.head.weight'])
        assert same is (expected == 'whole')


def test_a_partial_load_by_torch_stays_partial():
    model = backbone()
    names = model.load_state_dict({'patch_embed.0.bias': torch.full((8,), 3.0)}, strict=False)
    assert len(names.missing_keys) == len(model.state_dict()) - 1 and (model.patch_embed[0].bias == 3).all()


def test_strict_false_loads_what_fits(tmp_path):
    path = str(tmp_path / 'file.pth')
    torch.save(dict(model=official_weights(arch=dict(depths=(1, 1)))), path)
    model = backbone((1,), init_cfg=dict(type='Pretrained', checkpoint=path, strict=False))
    before = model.layers[1].blocks[1].op.in_proj.weight.clone()
    model.init_weights()
    assert torch.equal(model.layers[1].blocks[1].op.in_proj.weight, before)
    assert torch.equal(model.layers[1].blocks[0].op.in_proj.weight, WEIGHTS['layers.1.blocks.0.op.in_proj.weight'])
    torch.save(dict(model=official_weights(arch=dict(dims=8))), path)
    with pytest.raises(CheckpointError, match='places only, expected at least half'):
        model.init_weights()


def test_a_key_names_the_place(tmp_path):
    path = str(tmp_path / 'file.pth')
    torch.save(dict(mine=WEIGHTS, state_dict=OTHER), path)
    model = backbone((1,), init_cfg=dict(type='Pretrained', checkpoint=path, key='mine'))
    model.init_weights()
    assert_loaded(model, WEIGHTS)
    model.init_cfg = dict(type='Pretrained', checkpoint=path, key='yours')
    with pytest.raises(CheckpointError, match="no weights under key 'yours', expected one of 'mine', 'state_dict'"):
        model.init_weights()


@pytest.mark.parametrize('channels', [1, 2, 4, 6])
def test_other_channels_are_adapted_on_request(channels, tmp_path):
    path = str(tmp_path / 'file.pth')
    torch.save(dict(model=WEIGHTS), path)
    model = backbone((1,), in_channels=channels, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(CheckpointError, match=r'patch_embed\.0\.weight'):
        model.init_weights()
    model.init_cfg['in_channels'] = 'adapt'
    model.init_weights()
    rgb = by_init_cfg(path, None)
    grey = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(grey.expand(-1, channels, -1, -1)), rgb(grey.expand(-1, 3, -1, -1)))


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / 'file.safetensors'
    save_file(dict(WEIGHTS), path)
    for place in PLACES.values():
        model = place(str(path), tmp_path)
        assert_loaded(getattr(model, 'backbone', model), WEIGHTS)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match='no whole file of safetensors'):
        read_checkpoint(str(path))


def test_the_hub_needs_its_library_and_a_file(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'huggingface_hub', None)
    with pytest.raises(CheckpointError, match='pip install huggingface_hub'):
        read_checkpoint('hf://owner/name/weights.pth')
    with pytest.raises(CheckpointError, match='expected hf://OWNER/NAME/FILE'):
        read_checkpoint('hf://owner')


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_a_clean_copy_holds_the_weights_and_runs_nothing(tmp_path):
    source, target = str(tmp_path / 'file.pth'), str(tmp_path / 'clean.pth')
    torch.save(dict(model=WEIGHTS, args=argparse.Namespace(lr=1.0), trap=Trap(str(tmp_path / 'ran')), epoch=3), source)
    assert load_tool('model_converters/clean_checkpoint.py').main([source, target]) == 0
    assert not (tmp_path / 'ran').exists()
    content = read_checkpoint(target)
    assert content.keys() == {'model', 'epoch'} and content['epoch'] == 3
    assert_loaded(by_init_cfg(target, None), WEIGHTS)
