"""The command lines of train.py and test.py: what they do to a config, and what they refuse."""

import subprocess
from argparse import ArgumentParser

import pytest
from mmengine.config import Config

from mmvmamba import launch

from .conftest import ROOT

DEMO = {
    'mmpretrain': 'configs/demo/vmamba-nano_1xb64_digits-32px.py',
    'mmdet': 'configs/demo/mask-rcnn_vmamba-nano_fpn_1xb8-1e_digits.py',
    'mmseg': 'configs/demo/vmamba-nano_upernet_1xb4-4k_digits-128x128.py',
}


def load(config, *arguments):
    parser = ArgumentParser()
    parser.add_argument('config')
    launch.add_common_arguments(parser)
    return launch.load_config(parser.parse_args([str(config), *arguments]))


@pytest.mark.parametrize('scope', DEMO)
def test_work_dir_and_options(scope):
    cfg = load(ROOT / DEMO[scope], '--cfg-options', 'train_dataloader.batch_size=3')
    assert cfg.work_dir.startswith('work_dirs/') and cfg.train_dataloader.batch_size == 3
    assert load(ROOT / DEMO[scope], '--work-dir', 'here').work_dir == 'here'


@pytest.mark.parametrize('scope', DEMO)
def test_missing_data_is_named(scope, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(ROOT / DEMO[scope])
    with pytest.raises(launch.LaunchError, match=r"data_root 'data/digits/.*' of train_dataloader is not a folder"):
        launch.check_data(cfg, 'train')
    cfg.test_dataloader = None
    with pytest.raises(launch.LaunchError, match='no test_dataloader'):
        launch.check_data(cfg, 'test')


def test_data_inside_wrappers_is_checked(tmp_path):
    leaf = dict(type='CocoDataset', data_root=str(tmp_path / 'gone'))
    wrapped = dict(
        type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[dict(data_root=str(tmp_path)), leaf])
    )
    with pytest.raises(launch.LaunchError, match='gone'):
        launch.check_data(Config(dict(train_dataloader=dict(dataset=wrapped))), 'train')


def test_foreign_config(tmp_path):
    with pytest.raises(launch.LaunchError, match=r'nowhere.py.* is not a file'):
        load(tmp_path / 'nowhere.py')
    (tmp_path / 'plain.py').write_text('model = dict()\n')
    with pytest.raises(launch.LaunchError, match='default_scope None, expected one of mmpretrain, mmdet, mmseg'):
        load(tmp_path / 'plain.py')


@pytest.mark.parametrize('scope', DEMO)
def test_show_dir_switches_the_hook_on(scope):
    cfg = load(ROOT / DEMO[scope])
    launch.set_visualization(cfg, 'pictures')
    hook = cfg.default_hooks.visualization
    assert hook.get('enable') or hook.get('draw')
    assert 'pictures' in str(hook) + str(cfg.visualizer)
    del cfg.default_hooks['visualization']
    with pytest.raises(launch.LaunchError, match='visualization'):
        launch.set_visualization(cfg, 'pictures')


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet'])
def test_tta_defaults_to_a_flip(scope):
    cfg = load(ROOT / DEMO[scope])
    if scope == 'mmdet':
        with pytest.raises(launch.LaunchError, match='masks'):
            launch.set_test_time_augmentation(cfg)
        cfg.model.roi_head.mask_head = None
    inner = cfg.model
    launch.set_test_time_augmentation(cfg)
    assert cfg.model.module == inner and cfg.model.type in ('AverageClsScoreTTA', 'DetTTAModel')
    *_, last = cfg.test_dataloader.dataset.pipeline
    assert last.type == 'TestTimeAug' and [flip.prob for flip in last.transforms[0]] == [1.0, 0.0]


def test_tta_of_a_segmentor_needs_its_config():
    cfg = load(ROOT / DEMO['mmseg'])
    cfg.pop('tta_pipeline')
    with pytest.raises(launch.LaunchError, match='tta_pipeline'):
        launch.set_test_time_augmentation(cfg)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['nowhere.pth'], ('checkpoint', 'nowhere.pth')),
        ([__file__, '--out', 'results.txt'], ('--out', 'results.txt', '.pkl')),
    ],
)
def test_test_refuses(tool, arguments, words, capsys):
    assert tool('test.py').main([str(ROOT / DEMO['mmdet']), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith('error: ') and all(word in message for word in words)


def test_train_options(tool, user_folder, monkeypatch):
    monkeypatch.chdir(user_folder)
    train = tool('train.py')

    def prepare(*arguments):
        return train.prepare_config(train.parse_args([str(ROOT / DEMO['mmseg']), *arguments]))

    assert prepare('--amp').optim_wrapper.type == 'AmpOptimWrapper'
    assert prepare('--resume').resume is True and prepare('--resume').load_from is None
    assert prepare('--resume', 'a.pth').load_from == 'a.pth'
    assert prepare('--no-validate').val_dataloader is None
    with pytest.raises(launch.LaunchError, match='base_batch_size'):
        prepare('--auto-scale-lr')


@pytest.mark.parametrize(
    'script, arguments',
    [
        ('dist_train.sh', []),
        ('dist_train.sh', ['config.py']),
        ('dist_train.sh', ['config.py', 'two']),
        ('dist_test.sh', ['config.py', 'last.pth']),
        ('dist_test.sh', ['config.py', 'last.pth', '0']),
    ],
)
def test_shell_scripts_explain_their_usage(script, arguments, tmp_path):
    result = subprocess.run(['bash', ROOT / 'tools' / script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and 'usage:' in result.stderr and not list(tmp_path.iterdir())
