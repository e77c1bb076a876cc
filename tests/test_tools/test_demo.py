"""The demo's own parts: running steps, keeping earlier results, reading logs, writing the table."""

import json
import sys

import pytest

from mmvmamba.cli import UserError


@pytest.fixture(scope='module')
def demo(tool):
    return tool('demo.py')


def test_a_failed_step_names_its_log(demo, tmp_path, capsys):
    log = tmp_path / 'logs/step.log'
    with pytest.raises(UserError, match=r'training \(digits\) failed with exit code 3; its whole log is .*step.log'):
        demo.run('training (digits)', [sys.executable, '-c', "print('the cause'); raise SystemExit(3)"], log)
    assert log.read_text() == 'the cause\n' and 'the cause' in capsys.readouterr().err


def test_progress_lines_are_shown(demo, tmp_path, capsys):
    code = "print('noise'); print('07/01 - mmengine - INFO - Epoch(val) [5][6/6]  accuracy/top1: 98.1')"
    assert demo.run('step', [sys.executable, '-c', code], tmp_path / 'log') >= 0
    shown = capsys.readouterr().out
    assert 'Epoch(val) [5][6/6]  accuracy/top1: 98.1' in shown and 'noise' not in shown


def test_earlier_results_are_kept(demo, tmp_path):
    (tmp_path / 'demo_output').mkdir()
    (tmp_path / 'demo_output/metrics.md').write_text('mine')
    demo.keep_earlier(tmp_path / 'demo_output')
    assert [path.read_text() for path in tmp_path.glob('demo_output-*/metrics.md')] == ['mine']
    demo.keep_earlier(tmp_path / 'demo_output')  # nothing there: nothing to do


def test_metrics_table(demo, tmp_path):
    results = dict(
        classification=dict(metrics={'top-1': 0.991}, train_seconds=60, test_seconds=9, checkpoint='a.pth'),
        detection=dict(
            metrics={'box AP50': 0.9, 'mask AP50': 0.8}, train_seconds=300, test_seconds=20, checkpoint='b.pth'
        ),
    )
    table = demo.write_metrics(results, tmp_path)
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]
    assert all(len(row) == 5 for row in rows)
    assert rows[2] == ['classification', 'top-1', '0.991', '60', '9'] and rows[4][:3] == ['', 'mask AP50', '0.800']
    assert json.loads((tmp_path / 'metrics.json').read_text()) == results


def test_losses_are_drawn_from_the_log(demo, tmp_path):
    for name, count in (('classification', 3), ('segmentation', 5)):
        log = tmp_path / f'work_dirs/{name}/20260101_000000/vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        rows = [json.dumps(dict(loss=1 / (i + 1), step=10 * i)) for i in range(count)]
        log.write_text('\n'.join([*rows, json.dumps({'accuracy/top1': 98.0, 'step': 3})]))
    steps, losses = demo.read_losses(tmp_path / 'work_dirs/segmentation')
    assert steps == (0, 10, 20, 30, 40) and losses[1] == 0.5
    demo.draw_losses(dict(classification={}, segmentation={}), tmp_path)
    assert (tmp_path / 'losses.png').stat().st_size > 5000


def test_configs_and_metrics_exist(demo):
    from mmengine.config import Config

    for task in demo.TASKS:
        cfg = Config.fromfile(demo.ROOT / task.config)
        assert cfg.model.backbone.arch == 'nano' and task.metrics
