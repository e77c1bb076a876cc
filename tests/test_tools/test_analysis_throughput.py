"""throughput.py and gallery.py: figures, refusals, and the commands of the gallery."""

import json
import logging

import cv2
import numpy as np
import pytest
import torch

from mmvmamba import cli

from .conftest import ROOT

CLASSIFIER = str(ROOT / 'configs/demo/vmamba-nano_1xb64_digits-32px.py')
RESNET = str(ROOT / 'configs/demo/resnet18_1xb64_digits-32px.py')
DETECTOR = str(next((ROOT / 'configs/demo').glob('mask-rcnn_*.py')))
QUICK = ['--batch-size', '2', '--sizes', '32', '--mixed-sizes', '32', '48', '--warmup', '0', '--steps', '2']


@pytest.fixture(autouse=True)
def _quiet_logging(monkeypatch):
    """A logger that an earlier test made writes to that test's captured stream, which is closed by now."""
    monkeypatch.setattr(logging, 'raiseExceptions', False)


@pytest.fixture
def quick(tmp_path):
    return [*QUICK, '--device', 'cpu', '--out-dir', str(tmp_path / 'out')]


def test_a_figure_for_every_case(tool, quick, tmp_path, capsys):
    models = ['--model', 'VMamba', CLASSIFIER, '--model', 'ResNet', RESNET]
    assert tool('analysis/throughput.py').main([*models, *quick]) == 0
    result = json.loads((tmp_path / 'out/throughput.json').read_text())
    cases = [(row['model'], row['mode'], row['sizes']) for row in result['rows']]
    modes = [('inference', [32]), ('train', [32]), ('train-mixed', [32, 48])]
    assert cases == [(name, *case) for name in ('VMamba', 'ResNet') for case in modes]
    for row in result['rows']:
        assert row['images_per_second'] == pytest.approx(2 / row['seconds']) and row['peak_gib'] is None
    sizes = {row['model']: row['parameters'] for row in result['rows']}
    assert 0.8 < sizes['ResNet'] / sizes['VMamba'] < 1.25  # the gallery compares models of one size
    assert result['machine']['torch'] == torch.__version__ and result['machine']['batch_size'] == 2
    assert (tmp_path / 'out/throughput.png').stat().st_size > 1000
    assert capsys.readouterr().out.count('| VMamba |') == 3


def test_detectors_are_measured_to_their_neck(tool, quick, tmp_path):
    arguments = ['--model', 'detector', DETECTOR, *quick, '--modes', 'inference', 'train', '--steps', '1']
    assert tool('analysis/throughput.py').main(arguments) == 0
    rows = json.loads((tmp_path / 'out/throughput.json').read_text())['rows']
    assert [row['mode'] for row in rows] == ['inference', 'train'] and all(row['seconds'] > 0 for row in rows)


def test_no_figure_without_finite_outputs(tool, quick, tmp_path, monkeypatch, capsys):
    def load_broken(*arguments):
        model = load_model(*arguments)
        with torch.no_grad():
            model.head.fc.bias[3] = float('nan')
        return model

    load_model = cli.load_model
    monkeypatch.setattr(cli, 'load_model', load_broken)
    models = ['--model', 'broken', CLASSIFIER, '--modes', 'inference', 'train']
    assert tool('analysis/throughput.py').main([*models, *quick]) == 2
    captured = capsys.readouterr()
    assert 'were not finite' in captured.err and captured.err.startswith('error: 2 of 2 have no figure')
    rows = json.loads((tmp_path / 'out/throughput.json').read_text())['rows']
    assert len(rows) == 2 and all('images_per_second' not in row for row in rows)


def test_a_model_that_refuses_a_size_costs_no_other_figure(tool, quick, tmp_path, capsys):
    swin = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'  # its windows do not fit into a map of 1x1
    models = ['--model', 'Swin', swin, '--model', 'ResNet', RESNET, '--modes', 'inference']
    assert tool('analysis/throughput.py').main([*models, *quick]) == 2
    rows = json.loads((tmp_path / 'out/throughput.json').read_text())['rows']
    assert 'smaller than the window size' in rows[0]['error'] and rows[1]['images_per_second'] > 0
    assert 'error: 1 of 2 have no figure' in capsys.readouterr().err


def test_the_median_step_is_timed(tool, quick, monkeypatch):
    throughput = tool('analysis/throughput.py')
    args = throughput.parse_args(['--model', 'a', CLASSIFIER, *quick, '--steps', '3'])
    clock = iter([0, 1, 10, 12, 20, 29])  # steps of 1, 2 and 9 seconds
    bench = throughput.Bench(cli.load_model(CLASSIFIER, None), 'fp32', args)
    monkeypatch.setattr(throughput.time, 'perf_counter', lambda: next(clock))
    assert bench.measure('inference', [32])['seconds'] == 2


@pytest.mark.slow
def test_compiled_models_compute_what_eager_ones_do(tool, quick, tmp_path):
    throughput, config = tool('analysis/throughput.py'), tmp_path / 'small.py'
    arch = 'backbone=dict(arch=dict(_delete_=True, dims=8, depths=(1,)), out_indices=(0,), drop_path_rate=0.0)'
    config.write_text(f"_base_ = ['{CLASSIFIER}']\nmodel = dict({arch}, head=dict(in_channels=8))\n")
    words = ['--model', 'a', str(config), *quick]
    model = cli.load_model(str(config), None)
    eager = throughput.Bench(model, 'fp32', throughput.parse_args(words))
    compiled = throughput.Bench(model, 'fp32', throughput.parse_args([*words, '--compile', 'default']))
    (expected,), (scores,) = eager.infer(eager.images(32)), compiled.infer(eager.images(32))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    row = compiled.measure('train', [32])
    assert row['images_per_second'] > 0 and 'error' not in row


@pytest.mark.parametrize(
    'extra, words',
    [
        (['--batch-size', '0'], '--batch-size is 0, expected at least 1'),
        (['--sizes', '8'], '--sizes is 8, expected at least 32'),
        (['--mixed-sizes', '64', '99999'], '--mixed-sizes is 99999, expected at most'),
        (['--precisions', 'tf32'], '--precisions has tf32'),
        (['--model', 'b', 'mmpretrain::absent/absent.py'], "config 'mmpretrain::absent/absent.py' is not in"),
        (['--model', 'a', CLASSIFIER], "--model has the name 'a' 2 times"),
    ],
)
def test_bad_arguments_are_one_clear_line(tool, quick, tmp_path, capfd, extra, words):
    assert tool('analysis/throughput.py').main(['--model', 'a', CLASSIFIER, *quick, *extra]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith('error: ') and words in error and not (tmp_path / 'out').exists()


def test_an_unknown_compile_mode_is_refused_before_any_work(tool, quick, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tool('analysis/throughput.py').main(['--model', 'a', CLASSIFIER, *quick, '--compile', 'fastest'])
    assert stop.value.code == 2 and "invalid choice: 'fastest'" in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_gallery_needs_a_demo_and_plans_every_picture(tool, tmp_path, monkeypatch, capsys):
    gallery = tool('analysis/gallery.py')
    monkeypatch.chdir(tmp_path)
    assert gallery.main([]) == 2
    assert "--demo 'demo_output' has no trained work_dirs/classification" in capsys.readouterr().err
    for task in ('classification', 'detection', 'segmentation'):
        folder = tmp_path / 'demo_output/work_dirs' / task
        (folder / 'run/vis_data').mkdir(parents=True)
        (folder / 'config.py').touch()
        (folder / 'run/vis_data/scalars.json').touch()
        (folder / 'last_checkpoint').write_text(f'elsewhere/{task}.pth')
    assert gallery.main([]) == 2 and '/val/00000.png; run make demo first' in capsys.readouterr().err
    mask = np.zeros((40, 50), np.uint8)
    mask[10:20, 40:45] = 4
    for name in ('scenes', 'semantic'):
        (tmp_path / f'data/digits/{name}/val').mkdir(parents=True)
        cv2.imwrite(str(tmp_path / f'data/digits/{name}/val/00000.png'), mask)
    plan = gallery.commands(gallery.parse_args([]), tmp_path / 'gallery')
    trainings = ['resnet', 'resnet-64px', 'vmamba-64px']
    pictures = ['erf', 'attention_map', 'feature_map', 'robustness_resolution', 'throughput']
    assert list(plan) == [*trainings, *pictures, 'curves']
    for name in trainings:
        args = tool('train.py').parse_args(plan[name][1:])
        epochs = cli.read_config(args.config).train_cfg.max_epochs
        picture = 'erf' if name == 'resnet' else 'robustness_resolution'
        assert f'{args.work_dir}/epoch_{epochs}.pth' in plan[picture]  # the tool reads what the training writes
    for name in pictures:
        tool(f'analysis/{name}.py').parse_args(plan[name][1:])
    quick = gallery.commands(gallery.parse_args(['--quick']), tmp_path / 'gallery')
    assert any(word.endswith('resnet/epoch_1.pth') for word in quick['erf'])
    assert 'demo_output/work_dirs/detection/detection.pth' in plan['attention_map']
    pixel = tool('analysis/attention_map.py').parse_args(plan['attention_map'][1:]).pixel
    assert mask[pixel[1], pixel[0]] == 4  # on a digit
