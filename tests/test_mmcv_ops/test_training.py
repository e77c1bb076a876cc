"""Twenty training steps with the stand-in and with compiled mmcv: the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_mmcv_ops.cases import load_compiled
from tests.test_mmcv_ops.overlay import make_overlay, run
from tests.test_mmcv_ops.train_steps import STEPS, TASKS

pytestmark = pytest.mark.slow


@pytest.mark.skipif(load_compiled() is None, reason='mmcv is not compiled here')
@pytest.mark.parametrize('task', TASKS)
def test_losses_weights_and_predictions_have_the_same_bits(task, tmp_path):
    command = [sys.executable, '-W', 'ignore', str(Path(__file__).with_name('train_steps.py')), task]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    compiled = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    stand_in = run(command, make_overlay(tmp_path / 'site'), cwd=tmp_path, env={'OMP_NUM_THREADS': '1'})
    results = []
    for result in (compiled, stand_in):
        assert result.returncode == 0, result.stderr[-3000:]
        results.append(json.loads(result.stdout.splitlines()[-1]))
    if task != 'classifier':  # which uses no op of mmcv
        assert [result['stand_in'] for result in results] == [False, True]
    assert results[0]['found'] > 0 and len(results[0]['losses']) == STEPS
    for result in results:
        del result['stand_in']
    assert results[0] == results[1]
