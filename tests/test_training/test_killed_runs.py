"""Runs of the demo classifier that are killed and resumed end as one that was not."""

import os
import random
import re
import shutil
import subprocess
import sys

import pytest

from tests.test_tools.conftest import ROOT, run, user_folder  # noqa: F401  (fixtures)


def run_killed(folder, tmp_path, *arguments):
    shutil.copytree(folder / 'data', tmp_path / 'data')
    result = subprocess.run(
        [sys.executable, '-m', 'tests.test_training.killed_runs', str(tmp_path), *arguments],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    summary = re.search(r'(\d+) of \d+ runs were killed, (\d+) had resumed; .*', result.stdout)
    print(summary[0])
    return int(summary[1]), int(summary[2])


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(user_folder, tmp_path):  # noqa: F811
    assert run_killed(user_folder, tmp_path, '3', 'writing') == (1, 0)


@pytest.mark.slow
def test_killed_at_every_moment_of_saving(user_folder, tmp_path):  # noqa: F811
    kills = ['writing', 'rename', 'pointer', 'removal', 'writing']
    killed, resumed = run_killed(user_folder, tmp_path, '6', *kills)
    assert killed >= 4 and resumed >= 3


@pytest.mark.slow
def test_killed_at_random_moments(user_folder, tmp_path):  # noqa: F811
    """Twelve times; some come too late. The moments are printed if it fails."""
    kills = [f'{random.uniform(0.1, 0.5):.3f}' for _ in range(12)]
    print('kills', *kills)
    killed, resumed = run_killed(user_folder, tmp_path, '6', *kills)
    assert killed >= 5 and resumed >= 2
