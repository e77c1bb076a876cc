"""tools/benchmark/losses.py: both ways to train, a few iterations, and the distance."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.test_tools.conftest import load_tool, user_folder  # noqa: F401  (a fixture)


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'tools/benchmark')
    return load_tool('benchmark/losses.py')


@pytest.mark.slow
def test_a_few_iterations_of_both_ways(tool, user_folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(user_folder)
    monkeypatch.setattr(tool, 'SEEDS', (0, 2))
    options = ['train_dataloader.batch_size=4', 'train_dataloader.num_workers=0']
    options += ['train_dataloader.persistent_workers=False', 'param_scheduler=None', 'default_hooks.checkpoint=None']
    arguments = ['--tasks', 'classification', '--iterations', '3', '--backend', 'eager', '--out', 'losses.json']
    assert tool.main([*arguments, '--cfg-options', *options]) == 0
    (row,) = json.loads(Path('losses.json').read_text())['rows']
    assert row['within'] and row['iterations'] == 3 and len(row['noise']) == 1
    assert 0 <= row['distance'] < 0.1 * row['noise'][0], 'the same seed; another differs by far more'
    assert '| classification |' in capsys.readouterr().out


def test_distance_is_that_of_the_smoothed_losses(tool, monkeypatch):
    down = np.linspace(2, 1, 100)
    assert tool.distance(down, down + 0.5) == pytest.approx(0.5)
    assert tool.distance(down, down + 0.5 * (-1.0) ** np.arange(100)) < 0.03
    runs = iter([down, down + 0.1, down - 0.1, down + 0.5])
    monkeypatch.setattr(tool, 'train', lambda *_: next(runs))
    row = tool.compare('detection', None)
    assert not row['within'] and row['distance'] == pytest.approx(0.5) and max(row['noise']) == pytest.approx(0.2)
