"""The command lines of train.py and test.py: what they do to a config, and what they refuse."""

import re
import subprocess
from argparse import ArgumentParser

import pytest
import torch
from mmengine.config import Config

from mmvmamba.cli import UserError, launch

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
    with pytest.raises(UserError, match=r"data_root 'data/digits/.*' of train_dataloader is not a folder"):
        launch.check_data(cfg, 'train')
    cfg.test_dataloader = None
    with pytest.raises(UserError, match='no test_dataloader'):
        launch.check_data(cfg, 'test')


def test_data_inside_wrappers_is_checked(tmp_path):
    leaf = dict(type='CocoDataset', data_root=str(tmp_path / 'gone'))
    wrapped = dict(
        type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[dict(data_root=str(tmp_path)), leaf])
    )
    with pytest.raises(UserError, match='gone'):
        launch.check_data(Config(dict(train_dataloader=dict(dataset=wrapped))), 'train')


def test_foreign_config(tmp_path):
    with pytest.raises(UserError, match=r'nowhere.py.* is not a file'):
        load(tmp_path / 'nowhere.py')
    (tmp_path / 'plain.py').write_text('model = dict()\n')
    with pytest.raises(UserError, match='default_scope None, expected one of mmpretrain, mmdet, mmseg'):
        load(tmp_path / 'plain.py')


@pytest.mark.parametrize('scope', DEMO)
def test_show_dir_switches_the_hook_on(scope):
    cfg = load(ROOT / DEMO[scope])
    launch.set_visualization(cfg, 'pictures')
    hook = cfg.default_hooks.visualization
    assert hook.get('enable') or hook.get('draw')
    assert 'pictures' in str(hook) + str(cfg.visualizer)
    del cfg.default_hooks['visualization']
    with pytest.raises(UserError, match='visualization'):
        launch.set_visualization(cfg, 'pictures')


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet'])
def test_tta_defaults_to_a_flip(scope):
    cfg = load(ROOT / DEMO[scope])
    if scope == 'mmdet':
        with pytest.raises(UserError, match='masks'):
            launch.set_test_time_augmentation(cfg)
        cfg.model.roi_head.mask_head = None
    inner = cfg.model
    launch.set_test_time_augmentation(cfg)
    assert cfg.model.module == inner and cfg.model.type in ('AverageClsScoreTTA', 'DetTTAModel')
    *_, last = cfg.test_dataloader.dataset.pipeline
    assert last.type == 'TestTimeAug' and [flip.prob for flip in last.transforms[0]] == [1.0, 0.0]


@pytest.mark.parametrize('pipeline', [[], [1], [dict(type='LoadImageFromFile')]], ids=str)
def test_tta_by_a_flip_needs_the_packing(pipeline):
    cfg = load(ROOT / DEMO['mmpretrain'])
    cfg.test_dataloader.dataset.pipeline = pipeline
    with pytest.raises(UserError, match=r'test_dataloader.dataset.pipeline that ends in PackInputs'):
        launch.set_test_time_augmentation(cfg)


def test_tta_of_a_segmentor_needs_its_config():
    cfg = load(ROOT / DEMO['mmseg'])
    cfg.pop('tta_pipeline')
    with pytest.raises(UserError, match='tta_pipeline'):
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

    assert prepare().optim_wrapper.get('dtype') is None
    mixed = prepare('--amp').optim_wrapper
    assert (mixed.type, mixed.dtype) == ('mmvmamba.FastOptimWrapper', 'float16')
    mixed = prepare('--amp', '--cfg-options', 'optim_wrapper.type=OptimWrapper').optim_wrapper
    assert (mixed.type, mixed.loss_scale) == ('AmpOptimWrapper', 'dynamic')
    cfg = train.prepare_config(train.parse_args([str(ROOT / DEMO['mmpretrain'])]))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert loader.collate_fn.type == 'default_collate' and loader.persistent_workers
        assert loader.pin_memory is torch.cuda.is_available()
    assert 'collate_fn' not in prepare().train_dataloader
    assert prepare('--resume').resume is True and prepare('--resume').load_from is None
    assert prepare('--resume', 'a.pth').load_from == 'a.pth'
    assert prepare('--no-validate').val_dataloader is None
    with pytest.raises(UserError, match=r'no auto_scale_lr.*--auto-scale-lr'):
        prepare('--auto-scale-lr')
    with pytest.raises(UserError, match=r'no auto_scale_lr\.base_batch_size; expected a int'):
        prepare('--auto-scale-lr', '--cfg-options', 'auto_scale_lr.enable=True')


def test_urls_are_fetched_by_the_rules(tool, user_folder, monkeypatch, capsys):
    """mmengine gets the path of what was downloaded over https and held to its hash."""
    monkeypatch.chdir(user_folder)
    config, url = str(ROOT / DEMO['mmpretrain']), 'https://example.com/a-0123abcd.pth'
    for name, arguments in (
        ('test.py', [url]),
        ('train.py', ['--resume', url]),
        ('train.py', ['--cfg-options', f'load_from={url}']),
    ):
        module = tool(name)
        assert module.main([config, *(word.replace('https', 'http') for word in arguments)]) == 2
        assert re.match(r"error: .*'http://example.*over plain http; use https", capsys.readouterr().err)
        with monkeypatch.context() as patch:
            patch.setattr(launch, 'fetch_checkpoint', lambda asked: __file__ if asked == url else None)
            assert module.prepare_config(module.parse_args([config, *arguments])).load_from == __file__


WRONG_SETTINGS = [
    ('train.py', 'mmpretrain', '', 'default_hooks=3'),
    ('train.py', 'mmpretrain', '', 'default_hooks.checkpoint=3'),
    ('train.py', 'mmpretrain', '', 'model=3'),
    ('train.py', 'mmpretrain', '--amp', 'optim_wrapper=3'),
    ('train.py', 'mmpretrain', '--auto-scale-lr', 'auto_scale_lr=3'),
    ('test.py', 'mmpretrain', '--amp', 'test_cfg=3'),
    ('test.py', 'mmpretrain', '--amp', 'test_cfg=None'),
    ('test.py', 'mmpretrain', '--show-dir=x', 'default_hooks=3'),
    ('test.py', 'mmpretrain', '--tta', 'test_dataloader.dataset.pipeline=3'),
    ('test.py', 'mmseg', '--show-dir=x', 'visualizer=None'),
    ('test.py', 'mmseg', '--tta', 'tta_model=3'),
    ('test.py', 'mmdet', '--tta', 'model.roi_head=3'),
]


@pytest.mark.parametrize('name, scope, option, setting', WRONG_SETTINGS, ids=lambda value: value)
def test_settings_of_another_type_are_named(name, scope, option, setting, tool, user_folder, monkeypatch, capsys):
    monkeypatch.chdir(user_folder)
    arguments = [str(ROOT / DEMO[scope]), *([__file__] if name == 'test.py' else []), *option.split()]
    assert tool(name).main([*arguments, '--cfg-options', setting]) == 2
    key = setting.partition('=')[0]
    assert re.match(rf'error: .*\b{re.escape(key)}\b.*expected a ', capsys.readouterr().err)


def test_hooks_that_a_config_switches_off_stay_off(tool, user_folder, monkeypatch):
    monkeypatch.chdir(user_folder)
    train = tool('train.py')

    def hooks(setting):
        return train.prepare_config(
            train.parse_args([str(ROOT / DEMO['mmseg']), '--cfg-options', setting])
        ).default_hooks

    assert hooks('default_hooks.checkpoint=None').checkpoint is None
    assert hooks('default_hooks=None').checkpoint.type == 'mmvmamba.AtomicCheckpointHook'


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
