"""The linear probe: its classifier against scikit-learn's, its accuracy against the model's own, and resuming."""

import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mmvmamba import cli
from mmvmamba.analysis import linear_probe
from mmvmamba.analysis.feature_cache import FeatureCache
from mmvmamba.analysis.linear_probe import fit_linear_classifier

from .conftest import ROOT, load_tool

CONFIG = str(ROOT / 'configs/demo/vmamba-nano_1xb64_digits-32px.py')
SMALL = ['--size', '32', '--crop-ratio', '1', '--limit', '4', '--shard-size', '16', '--batch-size', '8']
SMALL += ['--workers', '0', '--device', 'cpu']


# ---- the classifier -------------------------------------------------------------------------------------------------
@pytest.fixture
def rows():
    """Features of very different scales, one of them constant, and labels that depend on some."""
    features = torch.randn(300, 6)
    labels = (features[:, :3] + 0.5 * torch.randn(300, 3)).argmax(dim=1)
    return features * torch.tensor([1.0, 100, 0.01, 1, 5, 0]) + torch.tensor([0.0, 300, 1, -2, 0, 7]), labels


@pytest.mark.parametrize('l2', [1e-1, 1e-3])
def test_classifier_is_that_of_scikit_learn(rows, l2):
    features, labels = rows
    steps = []
    found = fit_linear_classifier(features, labels, 3, l2, progress=lambda: steps.append(1))
    assert 1 <= found.iterations == len(steps) < 100
    values = features.double().numpy()
    std = values.std(axis=0)
    scaled = (values - values.mean(axis=0)) / np.where(std > 1e-5, std, 1)
    expected = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-8, max_iter=1000).fit(scaled, labels)
    chances = torch.nn.functional.linear(features, found.weight, found.bias).softmax(dim=1)
    np.testing.assert_allclose(chances, expected.predict_proba(scaled), atol=2e-3)
    loss = -np.log(expected.predict_proba(scaled)[np.arange(300), labels]).mean()
    assert found.loss == pytest.approx(loss, abs=1e-4)
    assert found.accuracy(features, labels) == pytest.approx(100 * expected.score(scaled, labels), abs=0.5)
    assert found.accuracy(features, labels, 3) == 100


def test_chunks_change_nothing(rows, monkeypatch):
    whole = fit_linear_classifier(*rows, 3, 1e-2)
    monkeypatch.setattr(linear_probe, 'CHUNK', 7)
    parts = fit_linear_classifier(*rows, 3, 1e-2)
    torch.testing.assert_close(parts.weight * rows[0].std(dim=0), whole.weight * rows[0].std(dim=0), rtol=0, atol=1e-2)
    assert parts.accuracy(*rows) == whole.accuracy(*rows)


def test_what_can_not_be_fitted_is_refused(rows):
    features, labels = rows
    for arguments, words in (
        ((features, labels, 1), 'classes is 1, expected at least 2'),
        ((features, labels, 2), 'labels are 0 to 2, expected some from 0 to 1'),
        ((features[:0], labels[:0], 3), 'labels are none'),
        ((features / 0, labels, 3), 'features are not finite'),
    ):
        with pytest.raises(ValueError, match=words):
            fit_linear_classifier(*arguments)


# ---- the command line -----------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def place(user_folder):
    """The digits, as train and val with a folder a class."""
    return user_folder / 'data/digits/classification'


def probe(place, out_dir, *more, config=CONFIG, checkpoint='none'):
    arguments = [config, checkpoint, '--data', str(place), *SMALL, '--out-dir', str(out_dir), *more]
    return load_tool('analysis/linear_probe.py').main(arguments)


@pytest.fixture(scope='module')
def done(place, tmp_path_factory):
    """The folder of a probe that ran through."""
    out_dir = tmp_path_factory.mktemp('probe')
    assert probe(place, out_dir) == 0
    return out_dir


def test_accuracy_is_that_of_the_whole_model(place, done):
    summary = json.loads((done / 'linear_probe.json').read_text())
    samples, classes = cli.list_samples(str(place / 'val'), '--data', 4)
    assert summary['images'] == dict(train=40, val=40) and summary['classes'] == classes and summary['channels'] == 256
    assert summary['top1']['train'] == 100 and 30 < summary['top1']['val'] <= summary['top5']['val']
    saved = torch.load(done / 'linear_probe.pth', weights_only=True)
    model = cli.load_model(CONFIG, None)
    assert model.load_state_dict(saved['state_dict'], strict=False).unexpected_keys == []
    images = torch.cat([cli.normalize(model, cli.read_image(path, 'image')) for path, _ in samples])
    with torch.no_grad():
        best = model(images, mode='tensor').argmax(dim=1)
    assert 100 * float((best == torch.tensor([label for _, label in samples])).float().mean()) == pytest.approx(
        summary['top1']['val']
    )


def test_an_interrupted_run_goes_on_with_its_shards(place, done, tmp_path, monkeypatch, capsys):
    write, written = FeatureCache.write, []

    def stop_after_two(self, split, shard, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append((split, shard))
        write(self, split, shard, *arguments)

    monkeypatch.setattr(FeatureCache, 'write', stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        probe(place, tmp_path)
    assert sorted(path.name for path in (tmp_path / 'features').glob('*.npz')) == ['train-00000.npz', 'train-00001.npz']
    (tmp_path / 'features/train-00001.npz').write_bytes(b'PK damaged')
    capsys.readouterr()
    assert probe(place, tmp_path) == 2 and 'has content; expected an empty or new folder' in capsys.readouterr().err
    made = []
    monkeypatch.setattr(
        FeatureCache, 'write', lambda self, *arguments: (made.append(arguments[:2]), write(self, *arguments))
    )
    assert probe(place, tmp_path, '--resume') == 0
    assert 'features: 1 of 6 shards are there' in capsys.readouterr().out
    assert made == [('train', 1), ('train', 2), ('val', 0), ('val', 1), ('val', 2)]
    assert (tmp_path / 'linear_probe.json').read_text() == (done / 'linear_probe.json').read_text()


def test_features_serve_again_and_nothing_of_the_user_is_touched(place, done, tmp_path, monkeypatch, capsys):
    out_dir = tmp_path / 'out'
    shutil.copytree(done, out_dir)
    (out_dir / 'features/train-mine.npz').write_text('mine')
    before = (out_dir / 'linear_probe.json').read_bytes()
    assert probe(place, out_dir, '--resume') == 2 and (out_dir / 'linear_probe.json').read_bytes() == before
    assert 'has linear_probe.json; expected none, or --force as well' in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(cli, 'resize_and_crop', None)  # no image is read again
        assert probe(place, out_dir, '--resume', '--force', '--l2', '1') == 0
    weak = json.loads((out_dir / 'linear_probe.json').read_text())
    assert weak['l2'] == 1 and weak['loss'] > 10 * json.loads(before)['loss']
    assert probe(place, out_dir, '--force') == 0
    assert 'features: 0 of 6 shards are there' in capsys.readouterr().out
    assert (out_dir / 'linear_probe.json').read_bytes() == before
    assert (out_dir / 'features/train-mine.npz').read_text() == 'mine'


def test_an_arch_by_name_and_new_folders_with_resume(place, tmp_path):
    assert probe(place, tmp_path / 'new', '--resume', config='nano') == 0
    assert json.loads((tmp_path / 'new/linear_probe.json').read_text())['channels'] == 256


@pytest.mark.parametrize(
    'more, words',
    [
        (['--size', '48'], 'features of size 32, not 48'),
        (['--crop-ratio', '0.5'], 'features of crop_ratio 1.0, not 0.5'),
    ],
)
def test_features_of_something_else_are_refused(place, done, tmp_path, capsys, more, words):
    shutil.copytree(done / 'features', tmp_path / 'out/features')
    before = {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    assert probe(place, tmp_path / 'out', '--resume', *more) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: --resume: ') and words in error and error.count('\n') == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}


@pytest.mark.parametrize(
    'more, words',
    [
        (['--size', '2'], '--size is 2, expected a number from 4'),
        (['--crop-ratio', '0'], '--crop-ratio is 0.0'),
        (['--limit', '0'], '--limit is 0, expected at least 1'),
        (['--batch-size', '0'], '--batch-size is 0'),
        (['--shard-size', '0'], '--shard-size is 0'),
        (['--workers', '-1'], '--workers is -1'),
        (['--l2', '-1'], '--l2 is -1.0, expected a finite number'),
        (['--l2', 'nan'], '--l2 is nan'),
        (['--iterations', '0'], '--iterations is 0'),
        (['--data', 'absent'], "--data 'absent/train' is not a folder"),
    ],
)
def test_bad_input_is_one_clear_line(place, tmp_path, capfd, more, words):
    assert probe(place, tmp_path / 'out', *more) == 2
    error = capfd.readouterr().err
    assert error.startswith('error: ') and words in error and error.count('\n') == 1, error
    assert not (tmp_path / 'out').exists()


def test_other_folders_and_broken_images_are_named(place, tmp_path, capfd):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/notes.txt').write_text('mine')
    assert probe(place, tmp_path / 'mine', '--resume') == 2 and 'has content' in capfd.readouterr().err
    for split in ('train', 'val'):
        for name in ('a', 'b', 'c')[: 3 if split == 'train' else 2]:
            (tmp_path / 'data' / split / name).mkdir(parents=True)
            (tmp_path / 'data' / split / name / 'x.png').write_bytes(b'no image')
    assert probe(tmp_path / 'data', tmp_path / 'out') == 2
    assert 'has 3 classes in train and 2 in val (look at c)' in capfd.readouterr().err
    shutil.rmtree(tmp_path / 'data/train/c')
    assert probe(tmp_path / 'data', tmp_path / 'out', '--workers', '1') == 2
    error = capfd.readouterr().err
    assert 'error: --data' in error and "train/a/x.png' is not an image that OpenCV reads" in error
