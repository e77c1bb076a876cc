"""Converters between the official and OpenMMLab's layouts, and publishing."""

import hashlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.registry import init_default_scope

from mmvmamba.checkpoint import read_checkpoint
from tests.test_checkpoint.test_checkpoint import ARCH, official_weights, old_names

TOOLS = Path(__file__).parents[2] / 'tools/model_converters'


def tool(name):
    """A converter as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vmamba2mm, mm2vmamba, publish_model = tool('vmamba2mm'), tool('mm2vmamba'), tool('publish_model')


def classifier():
    """mmpretrain's classifier around the small backbone."""
    from mmpretrain.registry import MODELS

    init_default_scope('mmpretrain')
    return MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='mmvmamba.VSSMBackbone', arch=dict(ARCH), out_indices=(1,)),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=32),
        )
    )


def published_forward(model, x):
    """The published classifier: norm of the last stage, pooling, head."""
    return model.head.fc(model.backbone(x)[-1].mean(dim=(2, 3)))


@pytest.mark.parametrize('layout', ['today', 'first release', 'averaged'])
def test_official_classifier_becomes_a_whole_classifier(layout, tmp_path, capsys):
    weights = official_weights()
    content = {
        'today': {'model': weights},
        'first release': {'model': old_names(weights)},
        'averaged': {'model': official_weights(3.0), 'model_ema': weights, 'max_accuray_ema': 80.0},
    }[layout]
    torch.save(content, tmp_path / 'official.pth')
    assert vmamba2mm.main([str(tmp_path / 'official.pth'), str(tmp_path / 'new/mm.pth')]) == 0
    assert f'wrote {len(weights)} weights' in capsys.readouterr().out
    model = classifier()
    model.load_state_dict(read_checkpoint(str(tmp_path / 'new/mm.pth'))['state_dict'], strict=True)
    assert torch.equal(model.head.fc.weight, weights['classifier.head.weight'])
    assert torch.equal(model.backbone.outnorm1.weight, weights['classifier.norm.weight'])
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), published_forward(model, x))


def test_weights_can_be_chosen(tmp_path):
    content = {'model': official_weights(3.0), 'model_ema': official_weights(), 'max_accuray_ema': 80.0}
    torch.save(content, tmp_path / 'official.pth')
    for key, scale in (('model', 3.0), ('model_ema', 1.0)):
        assert vmamba2mm.main([str(tmp_path / 'official.pth'), str(tmp_path / 'mm.pth'), '--weights', key]) == 0
        head = read_checkpoint(str(tmp_path / 'mm.pth'))['state_dict']['head.fc.bias']
        assert torch.equal(head, official_weights(scale)['classifier.head.bias'])


def test_there_and_back(tmp_path):
    weights = official_weights()
    torch.save({'model': weights}, tmp_path / 'official.pth')
    assert vmamba2mm.main([str(tmp_path / 'official.pth'), str(tmp_path / 'mm.pth')]) == 0
    assert mm2vmamba.main([str(tmp_path / 'mm.pth'), str(tmp_path / 'back.pth')]) == 0
    back = read_checkpoint(str(tmp_path / 'back.pth'))['model']
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)


def test_official_detector_of_the_first_release(tmp_path):
    weights = {key: value for key, value in official_weights().items() if 'classifier' not in key}
    state = {f'backbone.{key}': value for key, value in old_names(weights).items()}
    content = dict(state_dict={**state, 'neck.weight': torch.ones(3)}, meta=dict(CLASSES=('a', 'b'), time='now'))
    torch.save(content, tmp_path / 'official.pth')
    assert vmamba2mm.main([str(tmp_path / 'official.pth'), str(tmp_path / 'mm.pth')]) == 0
    converted = read_checkpoint(str(tmp_path / 'mm.pth'))
    assert converted['state_dict'].keys() == {f'backbone.{key}' for key in weights} | {'neck.weight'}
    assert converted['meta'] == dict(CLASSES=('a', 'b'))
    assert mm2vmamba.main([str(tmp_path / 'mm.pth'), str(tmp_path / 'back.pth')]) == 0
    assert read_checkpoint(str(tmp_path / 'back.pth'))['model'].keys() == weights.keys()


@pytest.mark.parametrize('converter', [vmamba2mm, mm2vmamba, publish_model], ids=lambda module: module.__name__)
def test_wrong_files_are_errors(converter, tmp_path, capsys):
    torch.save({'optimizer': {}}, tmp_path / 'wrong.pth')
    (tmp_path / 'text.pth').write_text('no checkpoint')
    for name, words in (('wrong', 'weights'), ('text', 'torch.save'), ('nowhere', 'not a file')):
        if converter is not publish_model and name == 'wrong':
            words = 'optimizer'
        assert converter.main([str(tmp_path / f'{name}.pth'), str(tmp_path / 'out.pth')]) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['text.pth', 'wrong.pth']


CONVERTERS = pytest.mark.parametrize(
    'converter', [vmamba2mm, mm2vmamba, publish_model], ids=lambda module: module.__name__
)


@CONVERTERS
@pytest.mark.parametrize('fault', ['full disk', 'interrupt'])
def test_what_is_not_written_whole_replaces_nothing(converter, fault, tmp_path, capsys, monkeypatch):
    """Source and target may be one file."""
    path = tmp_path / 'weights.pth'
    torch.save({'model': official_weights()}, path)
    before = path.read_bytes()

    def save(content, target):
        target.write(b'PK') if hasattr(target, 'write') else Path(target).write_bytes(b'PK')
        raise OSError(28, 'No space left on device') if fault == 'full disk' else KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', save)
    if fault == 'full disk':
        assert converter.main([str(path), str(path)]) == 2
        assert re.match(r'error: .*weights.pth cannot be written \(No space left', capsys.readouterr().err)
    else:
        with pytest.raises(KeyboardInterrupt):
            converter.main([str(path), str(path)])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@CONVERTERS
def test_a_target_that_is_a_folder(converter, tmp_path, capsys):
    torch.save({'model': official_weights()}, tmp_path / 'weights.pth')
    (tmp_path / 'file').touch()
    assert converter.main([str(tmp_path / 'weights.pth'), str(tmp_path / 'file/out.pth')]) == 2
    assert 'cannot be written' in capsys.readouterr().err


@pytest.mark.parametrize(
    'content', [[1], {'state_dict': [1]}, {'state_dict': {'a': 1}}, {'ema_state_dict': 3}], ids=str
)
def test_publish_names_what_holds_no_weights(content, tmp_path, capsys):
    torch.save(content, tmp_path / 'wrong.pth')
    for weights in publish_model.PLACES:
        assert publish_model.main([str(tmp_path / 'wrong.pth'), str(tmp_path / 'o.pth'), '--weights', weights]) == 2
        assert re.match(r'error: no weights in .*state_dict.* with names and tensors', capsys.readouterr().err)


class FakeRunner:
    """What EMAHook needs of a Runner."""

    iter = epoch = 0
    _resume = False

    def __init__(self, model):
        self.model = model


def trained_with_ema():
    """A model stepped once under mmengine's EMAHook, and what its hook makes of a checkpoint."""
    model = torch.nn.Linear(3, 2)
    runner = FakeRunner(model)
    hook = EMAHook(momentum=0.5)
    hook.before_run(runner)
    raw = []
    for _ in range(2):
        with torch.no_grad():
            model.weight.add_(1.0)
        hook.after_train_iter(runner, 0)
        raw.append(model.weight.detach().clone())
    checkpoint = dict(
        state_dict=dict(model.state_dict()), meta=dict(epoch=1, dataset_meta=dict(classes=['a'])), optimizer=dict(a=1)
    )
    hook.before_save_checkpoint(runner, checkpoint)
    return raw[-1], hook.ema_model.module.weight.detach().clone(), checkpoint


def test_publish_takes_averaged_or_raw_weights(tmp_path, capsys):
    raw, averaged, checkpoint = trained_with_ema()
    assert not torch.equal(raw, averaged)
    torch.save(checkpoint, tmp_path / 'epoch_1.pth')
    for weights, expected in (('averaged', averaged), ('raw', raw)):
        folder = tmp_path / weights
        assert publish_model.main([str(tmp_path / 'epoch_1.pth'), str(folder / 'm.pth'), '--weights', weights]) == 0
        (path,) = folder.iterdir()
        assert path.name == f'm-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth'
        assert str(path) in capsys.readouterr().out
        published = read_checkpoint(str(path))
        assert published.keys() == {'state_dict', 'meta'} and published['state_dict'].keys() == {'weight', 'bias'}
        assert torch.equal(published['state_dict']['weight'], expected)
        assert published['meta'] == dict(epoch=1, dataset_meta=dict(classes=['a']))


def test_publish_official_averaged_weights(tmp_path):
    content = {'model': official_weights(), 'model_ema': official_weights(2.0), 'optimizer': {}}
    torch.save(content, tmp_path / 'official.pth')
    for _ in range(2):  # the same weights get the same name
        assert publish_model.main([str(tmp_path / 'official.pth'), str(tmp_path / 'out/m.pth')]) == 0
    (path,) = (tmp_path / 'out').iterdir()
    published = read_checkpoint(str(path))
    assert published.keys() == {'model'}
    assert torch.equal(published['model']['classifier.head.bias'], content['model_ema']['classifier.head.bias'])
