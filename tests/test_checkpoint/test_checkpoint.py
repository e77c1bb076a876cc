"""Checkpoints in every known layout load strictly; damaged or wrong files are errors, never random weights."""

import os
import sys
import types
from collections import OrderedDict

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from mmvmamba import VSSMBackbone
from mmvmamba.checkpoint import CheckpointError, load_pretrained, read_checkpoint
from mmvmamba.models.vssm import fitting_archs
from tests.fill import fill_array, fill_module

ARCH = dict(dims=16, depths=(1, 2), drop_path_rate=0.0)


def backbone(out_indices=(0, 1), **options):
    """A small backbone; what the tests load into."""
    return VSSMBackbone(dict(ARCH, **options.pop('arch', {})), out_indices=out_indices, **options)


def official_weights(scale=1.0, arch=None):
    """State dict of the published classifier around the small backbone, filled by name."""
    state = backbone((1,), arch=arch or {}).state_dict()
    shapes = {key.replace('outnorm1.', 'classifier.norm.'): value.shape for key, value in state.items()}
    shapes.update({'classifier.head.weight': (10, 32), 'classifier.head.bias': (10,)})
    return OrderedDict((key, scale * torch.from_numpy(fill_array(key, shape))) for key, shape in shapes.items())


def old_names(state):
    """The first release's spelling."""
    renamed = OrderedDict()
    for key, value in state.items():
        key = key.replace('patch_embed.0.', 'patch_embed.proj.').replace('patch_embed.2.', 'patch_embed.norm.')
        key = key.replace('classifier.', '').replace('.op.', '.self_attention.')
        renamed[key.replace('.norm.', '.ln_1.') if '.blocks.' in key else key] = value
    return renamed


def is_linear(key, value):
    """Whether a weight may be stored as that of a 1x1 convolution."""
    return key.endswith('.weight') and value.dim() == 2


def save(content, path):
    """Save a checkpoint; returns its ``init_cfg``."""
    torch.save(content, path)
    return dict(type='Pretrained', checkpoint=str(path))


def assert_loaded(model, weights):
    """Every weight of the backbone but its output norms is that of an official state dict."""
    state = model.state_dict()
    for key, value in state.items():
        if not key.startswith('outnorm'):
            assert torch.equal(value, weights[key].float().reshape(value.shape)), key


@pytest.fixture
def log(monkeypatch):
    """Messages that loading sends to the log."""
    lines = []
    monkeypatch.setattr('mmvmamba.checkpoint.fit.print_log', lambda message, logger=None: lines.append(message))
    return lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'weights.pth'


def build_through_init(init_cfg, **options):
    """What a task does: build the model, then initialize it."""
    model = backbone(init_cfg=init_cfg, **options)
    model.init_weights()
    return model


# ---- layouts --------------------------------------------------------------------------------------------------------
LAYOUTS = {
    'official': lambda state: {'model': state, 'epoch': 3},
    'bare official': lambda state: state,
    'first release': lambda state: {'model': old_names(state)},
    'ddp': lambda state: {'model': {f'module.{key}': value for key, value in state.items()}},
    'compiled': lambda state: {'model': {f'_orig_mod.{key}': value for key, value in state.items()}},
    '1x1 convolutions': lambda state: {
        'model': {key: value[:, :, None, None] if is_linear(key, value) else value for key, value in state.items()}
    },
    'half precision': lambda state: {'model': {key: value.half() for key, value in state.items()}},
    'OpenMMLab backbone': lambda state: {'state_dict': state, 'meta': {}},
    'OpenMMLab detector': lambda state: {
        'state_dict': {
            **{f'backbone.{key}': value for key, value in state.items() if 'classifier' not in key},
            'backbone.outnorm0.weight': torch.ones(16),
            'backbone.outnorm0.bias': torch.ones(16),
            'backbone.outnorm1.weight': torch.ones(32),
            'backbone.outnorm1.bias': torch.ones(32),
            'neck.weight': torch.zeros(3),
            'roi_head.bbox_head.fc_cls.weight': torch.zeros(3, 3),
        },
        'meta': dict(epoch=12),
        'optimizer': dict(state={0: dict(exp_avg=torch.zeros(3))}),
    },
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('out_indices', [(1,), (0, 1)], ids=['classifier', 'detector'])
def test_layouts(layout, out_indices, path, log):
    weights = official_weights()
    model = build_through_init(save(LAYOUTS[layout](weights), path), out_indices=out_indices)
    if layout == 'half precision':
        weights = {key: value.half() for key, value in weights.items()}
    assert_loaded(model, weights)
    norm = model.outnorm1.weight
    if layout == 'OpenMMLab detector':
        assert torch.equal(norm, torch.ones(32)) and torch.equal(model.outnorm1.bias, torch.ones(32))
    elif out_indices == (1,):
        assert torch.equal(norm, weights['classifier.norm.weight'].float())
    else:  # a detector starts with new output norms, as the published ones did
        assert torch.equal(norm, torch.ones(32)) and 'kept as initialized: outnorm0, outnorm1' in log[0]
    assert len(log) == 1


def test_one_log_line_says_what_was_left_out(path, log):
    build_through_init(save(LAYOUTS['OpenMMLab detector'](official_weights()), path), out_indices=(1,))
    assert len(log) == 1 and 'state_dict' in log[0] and str(path) in log[0]
    assert 'neck (1)' in log[0] and 'roi_head (1)' in log[0] and 'outnorm0 (2)' in log[0]


def test_classifier_file_of_openmmlab_starts_a_detector_as_an_official_one_does(path, log):
    weights = official_weights()
    state = {f'backbone.{key}'.replace('classifier.norm', 'outnorm1'): value for key, value in weights.items()}
    model = build_through_init(save({'state_dict': state}, path))
    assert_loaded(model, weights)
    assert torch.equal(model.outnorm1.weight, torch.ones(32))


def test_log_reaches_the_runner_logger(path):
    logger = MMLogger.get_instance('checkpoint-test', log_file=str(path.with_suffix('.log')))
    build_through_init(save({'model': official_weights()}, path))
    del logger
    assert 'kept as initialized' in path.with_suffix('.log').read_text()


@pytest.mark.parametrize(
    'record, chosen',
    [
        (dict(max_accuracy=80.0, max_accuray_ema=81.0), 'model_ema'),
        (dict(max_accuracy=80.0, max_accuracy_ema=81.0), 'model_ema'),
        (dict(max_accuracy=80.0, max_accuray_ema=0.0), 'model'),
        (dict(max_accuracy=80.0, max_accuray_ema=None), 'model'),
        (dict(max_accuracy=80.0), 'model'),
    ],
    ids=['evaluated', 'other spelling', 'not yet', 'none', 'no record'],
)
def test_averaged_weights_are_preferred_when_evaluated(record, chosen, path, log):
    content = {'model': official_weights(), 'model_ema': official_weights(2.0), **record}
    model = build_through_init(save(content, path))
    assert_loaded(model, content[chosen])
    assert f'from {chosen} of' in log[0]


def test_prefix(path, log):
    weights = official_weights()
    init_cfg = save({'state_dict': {f'student.net.{key}': value for key, value in weights.items()}}, path)
    for prefix in ('student.net.', 'student.net'):
        assert_loaded(build_through_init(dict(init_cfg, prefix=prefix, map_location='cpu')), weights)


def test_official_file_with_its_configuration_object(path, log, monkeypatch):
    """Official files hold a yacs node; it must load as plain data without yacs."""
    module = types.ModuleType('yacs.config')

    class CfgNode(dict):
        def __init__(self, **values):
            super().__init__(values)
            self.__dict__['__immutable__'] = True

    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    module.CfgNode = CfgNode
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', module)
        init_cfg = save({'model': official_weights(), 'config': CfgNode(MODEL=CfgNode(NAME='vssm'))}, path)
    assert_loaded(build_through_init(init_cfg), official_weights())
    assert read_checkpoint(str(path))['config'] == {'MODEL': {'NAME': 'vssm'}}


@pytest.mark.parametrize('scope, norms', [('mmpretrain', (1,)), ('mmdet', (0, 1)), ('mmseg', (0, 1))])
def test_official_file_in_each_task(scope, norms, path, log):
    from importlib import import_module

    init_default_scope(scope)
    init_cfg = save({'model': official_weights()}, path)
    config = dict(type='mmvmamba.VSSMBackbone', arch=dict(ARCH), out_indices=norms, init_cfg=init_cfg)
    model = import_module(f'{scope}.registry').MODELS.build(config)
    model.init_weights()
    assert_loaded(model, official_weights())


@pytest.mark.parametrize('wrap', [lambda state: state, old_names], ids=['today', 'first release'])
def test_whole_model_loads_old_names_and_shapes(wrap):
    """`load_state_dict` of a detector meets the same files as init_cfg does."""
    weights = {key: value for key, value in official_weights().items() if 'classifier' not in key}
    state = {f'backbone.{key}': value for key, value in wrap(weights).items()}
    state['neck.weight'] = torch.ones(3, 3)
    for key in [key for key in state if key.endswith('proj.weight') and is_linear(key, state[key])]:
        state[key] = state[key][:, :, None, None]
    whole = torch.nn.ModuleDict(dict(backbone=backbone((0,)), neck=torch.nn.Linear(3, 3, bias=False)))
    missing, unexpected = whole.load_state_dict(state, strict=False)
    assert sorted(missing) == ['backbone.outnorm0.bias', 'backbone.outnorm0.weight'] and not unexpected
    assert_loaded(whole['backbone'], weights)


# ---- damaged or wrong files -----------------------------------------------------------------------------------------
def without(key):
    def change(state):
        del state[key]
        return {'model': state}

    return change


def extra(state):
    state['layers.0.blocks.0.op.pos_embed'] = torch.zeros(3)
    return {'model': state}


def reshaped(state):
    state['layers.1.blocks.0.op.Ds'] = torch.zeros(7)
    return {'model': state}


def integer(state):
    state['layers.1.blocks.0.op.Ds'] = state['layers.1.blocks.0.op.Ds'].to(torch.int8)
    return {'model': state}


class Code:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch ran_code',)


WRONG = {
    'missing key': (without('layers.0.blocks.0.op.A_logs'), ['1 missing', 'layers.0.blocks.0.op.A_logs']),
    'extra key': (extra, ['1 unexpected', 'layers.0.blocks.0.op.pos_embed']),
    'wrong shape': (reshaped, ['layers.1.blocks.0.op.Ds (7,), expected (128,)']),
    'integer weights': (integer, ['other kinds', 'layers.1.blocks.0.op.Ds torch.int8']),
    'optimizer only': (
        lambda state: {'optimizer': {'state': {}}},
        ['optimizer', 'expected weights under one of model'],
    ),
    'a list': (lambda state: [1, 2], ['holds a list']),
    'no tensors': (lambda state: {'model': {'a': 1}}, ['holds model']),
    'another model': (lambda state: {'state_dict': {'conv1.weight': torch.zeros(1)}}, ['conv1.weight', 'no weights']),
    'code': (lambda state: {'model': state, 'extra': Code()}, ['posix.system', 'could run code']),
}


@pytest.mark.parametrize('kind', WRONG)
def test_wrong_file(kind, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, words = WRONG[kind]
    init_cfg = save(change(official_weights()), path)
    model = backbone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        load_pretrained(model, init_cfg)
    assert all(word in str(raised.value) for word in [str(path), *words])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not os.path.exists('ran_code')


def test_wrong_arch_names_the_one_that_fits(path):
    state = VSSMBackbone('nano').state_dict()
    assert fitting_archs({key: value.shape for key, value in state.items()}) == ['nano']
    with pytest.raises(CheckpointError, match=r"it fits arch 'nano'.*missing.*unexpected"):
        VSSMBackbone(dict(dims=32, depths=(1, 1, 1, 2))).load_pretrained(save({'model': state}, path))


def test_unknown_arch_is_described(path):
    init_cfg = save({'model': official_weights()}, path)
    with pytest.raises(CheckpointError, match=r'no known arch fits; it has depths \(1, 2\), dims \(16, 32\)'):
        build_through_init(init_cfg, arch=dict(depths=(1, 1)))
    with pytest.raises(CheckpointError, match=r'does not fit this backbone, it has depths \(1, 2\), dims \(16, 32\)'):
        load_pretrained(backbone(arch=dict(depths=(1, 1))), init_cfg)


def test_what_the_backbone_was_built_without_is_left_out(path, log):
    weights = official_weights()
    init_cfg = save({'model': {**weights, 'layers.1.downsample.1.weight': torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match=r'1 unexpected: layers\.1\.downsample'):
        load_pretrained(backbone(), init_cfg)
    model = backbone()
    load_pretrained(
        model, init_cfg, lambda keys: [key for key in keys if 'downsample.1' in key and key.startswith('layers.1.')]
    )
    assert_loaded(model, weights)
    assert 'layers (1)' in log[0]


def test_wrong_prefix(path):
    weights = official_weights()
    student = {f'student.{key}': value for key, value in weights.items()}
    init_cfg = save({'state_dict': {**student, **{f'tutor.{key}': value for key, value in weights.items()}}}, path)
    with pytest.raises(
        CheckpointError, match=r"a patch_embed under each of 'student\.', 'tutor\.'; expected one of them"
    ):
        load_pretrained(backbone(), init_cfg)
    with pytest.raises(CheckpointError, match=r"under prefix 'teacher\.'"):
        load_pretrained(backbone(), dict(init_cfg, prefix='teacher'))


def test_only_averaged_weights(path, log):
    model = build_through_init(save({'model_ema': official_weights(2.0)}, path))
    assert_loaded(model, official_weights(2.0))


@pytest.mark.parametrize('cut', [0.99, 0.5, 0.01], ids=str)
def test_truncated(cut, path):
    init_cfg = save({'model': official_weights()}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(CheckpointError, match=r'truncated|not a file of torch.save'):
        load_pretrained(backbone(), init_cfg)


@pytest.mark.parametrize('content', [b'', b'<html>not found</html>', b'\x00' * 100], ids=['empty', 'text', 'zeros'])
def test_no_checkpoint(content, path):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'weights.pth'):
        load_pretrained(backbone(), dict(type='Pretrained', checkpoint=str(path)))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere.pth'):
        build_through_init(dict(type='Pretrained', checkpoint=str(tmp_path / 'nowhere.pth')))


@pytest.mark.parametrize(
    'init_cfg, error, words',
    [
        (dict(type='Pretrained'), TypeError, 'checkpoint'),
        (dict(type='Pretrained', checkpoint=None), TypeError, 'checkpoint'),
        (dict(type='Pretrained', checkpoint='a.pth', perfix='b'), TypeError, 'perfix'),
        (dict(type='Pretrained', checkpoint='a.pth', prefix=3), TypeError, 'prefix'),
        (dict(type='TruncNormal', layer='Linear'), ValueError, 'TruncNormal'),
        ('a.pth', TypeError, 'str'),
    ],
    ids=['no checkpoint', 'none', 'unknown key', 'prefix', 'other type', 'string'],
)
def test_bad_init_cfg(init_cfg, error, words):
    with pytest.raises(error, match=words):
        load_pretrained(backbone(), init_cfg)


# ---- the whole way --------------------------------------------------------------------------------------------------
def test_filled_model_gives_published_logits_from_a_file(path, log, model_reference, image):
    """The whole way: a filled official file, loaded for classification, gives the published numbers."""
    from tests.test_models.test_reference import Classifier, published_name

    source = fill_module(Classifier(VSSMBackbone('tiny-s1l8', out_indices=(3,))), published_name)
    state = {published_name(key): value for key, value in source.state_dict().items()}
    model = Classifier(VSSMBackbone('tiny-s1l8', (3,), init_cfg=save({'model': state}, path))).eval()
    model.backbone.init_weights()
    model.head.load_state_dict(source.head.state_dict())
    expected = torch.from_numpy(model_reference['vmamba_tiny_s1l8/64x64/logits'])
    with torch.no_grad():
        assert (model(image(64, 64)) - expected).abs().max() < 1e-5 * expected.std()
