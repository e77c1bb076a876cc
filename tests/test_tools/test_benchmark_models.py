"""tools/benchmark/models.py: one small run on CPU, and the ratios."""

import json
import time
from pathlib import Path

import pytest

from tests.test_tools.conftest import load_tool


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'tools/benchmark')
    return load_tool('benchmark/models.py')


def test_measures_writes_and_compares(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(tool.SETTINGS, '224', (1, 32, 32, 'classify'))
    arguments = (
        '--device cpu --models nano unfused:nano --baseline unfused:nano --precisions fp32 bf16 --executions eager'
    )
    rows = tool.main([*arguments.split(), '--repeats', '2', '--calls', '1', '--out', str(tmp_path / 'a.json')])
    assert len(rows) == 8
    assert all(row.images_per_second > 0 and row.spread >= 0 for row in rows)
    assert all(row.ratio == 1 for row in rows if row.model == 'unfused:nano')
    report = json.loads((tmp_path / 'a.json').read_text())
    assert [row['model'] for row in report['rows']] == [row.model for row in rows]
    assert set(report) == {'machine', 'versions', 'commit', 'commands', 'rows'} and 'torch' in report['versions']


def test_rows_are_added_only_to_those_of_the_same_build(tool, tmp_path, monkeypatch):
    file = tmp_path / 'a.json'
    for commit in ('abc', 'abc'):
        monkeypatch.setenv('MMVMAMBA_COMMIT', commit)
        tool.report.write(file, 'cpu', [dict(model='a')], add=True)
    report = json.loads(file.read_text())
    assert report['commit'] == 'abc' and len(report['rows']) == len(report['commands']) == 2
    monkeypatch.setenv('MMVMAMBA_COMMIT', 'def')
    with pytest.raises(SystemExit, match="has commit 'abc', this run has 'def'"):
        tool.report.write(file, 'cpu', [dict(model='a')], add=True)


def test_measures_archs_without_a_kind_of_layer(tool, monkeypatch):
    monkeypatch.setitem(tool.SETTINGS, '224', (1, 32, 32, 'classify'))
    seen = []
    use_backend = tool.use_backend
    monkeypatch.setattr(tool, 'use_backend', lambda name, ops: seen.append((name, ops)) or use_backend(name, ops))
    arguments = '--device cpu --models nano --baseline nano --precisions fp32 --executions eager --modes infer'
    rows = tool.main([*arguments.split(), '--repeats', '1', '--calls', '1', '--without', *tool.LAYERS])
    assert [row.model for row in rows] == ['nano', *(f'nano without {layer}' for layer in tool.LAYERS)]
    assert seen == [('naive', ops) for ops in tool.LAYERS.values()]


def test_ratios_are_within_a_setting(tool):
    def row(model, mode, speed):
        return tool.Row(model, '224', 'fp16', mode, 'eager', speed, 0.0, 0.0)

    rows = [row('a', 'infer', 30), row('b', 'infer', 20), row('a', 'train', 5)]
    tool.add_ratios(rows, 'b')
    assert [entry.ratio for entry in rows] == [1.5, 1.0, None]
    assert '| 1.50 |' in tool.format_table(rows)


def test_shows_how_much_of_a_call_is_launching(tool, monkeypatch):
    monkeypatch.setattr(tool.torch.cuda, 'synchronize', lambda: None)
    seconds = tool.Timer('cuda', 3, 1).launching(lambda: time.sleep(0.01))
    assert 0.01 <= seconds < 1
    row = tool.Row('a', '224', 'fp16', 'train', 'eager', 100.0, 0.0, 0.0, host=0.25)
    assert '| 25% |' in tool.format_table([row])


def test_unknown_models_are_named(tool):
    with pytest.raises(ValueError, match='huge'):
        tool.build_model('huge', 'classify', (32, 32))
    with pytest.raises(ValueError, match='zoo'):
        tool.build_model('zoo:x', 'classify', (32, 32))
