"""Twenty training steps with the stand-in; where compiled mmcv is installed, the same bits with both."""

import json
import sys
from pathlib import Path

import pytest

from tests.test_mmcv_ops.cases import load_compiled
from tests.test_mmcv_ops.overlay import make_overlay, run, run_installed
from tests.test_mmcv_ops.train_steps import STEPS, TASKS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize('task', TASKS)
def test_twenty_steps_learn_and_have_the_bits_of_compiled_mmcv(task, tmp_path):
    command = [sys.executable, '-W', 'ignore', str(Path(__file__).with_name('train_steps.py')), task]
    options = dict(cwd=tmp_path, env={'OMP_NUM_THREADS': '1'})
    stand_in = result_of(run(command, make_overlay(tmp_path / 'site'), **options))
    assert stand_in.pop('stand_in') and stand_in['found'] > 0
    losses = [float.fromhex(step['loss']) for step in stand_in['losses']]
    assert len(losses) == STEPS and sum(losses[-5:]) < sum(losses[:5])
    if load_compiled() is not None:
        compiled = result_of(run_installed(command, **options))
        assert not compiled.pop('stand_in') and stand_in == compiled


def result_of(process):
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])
