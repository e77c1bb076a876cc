"""The Slurm scripts, with an srun that only writes down what it is told."""

import os
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture
def run(tmp_path):
    """Function that runs a script beside a fake srun and returns the process."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)

    def run_script(script, *arguments, **environment):
        path = f'{tmp_path}:{os.environ["PATH"]}'
        return subprocess.run(
            [TOOLS / script, *arguments], env={'PATH': path, **environment}, capture_output=True, text=True
        )

    return run_script


@pytest.mark.parametrize(
    'script, files', [('slurm_train.sh', ['c.py']), ('slurm_test.sh', ['c.py', 'w.pth'])], ids=['train', 'test']
)
def test_slurm(script, files, run):
    result = run(script, 'gpu', 'job', *files, '--amp', '--work-dir', 'a b', GPUS='16', SRUN_ARGS='-x n1 --quiet')
    arguments = result.stdout.splitlines()
    assert result.returncode == 0 and arguments[:3] == ['-p', 'gpu', '--job-name=job']
    for word in ('--gres=gpu:8', '--ntasks=16', '--ntasks-per-node=8', '--cpus-per-task=5', '-x', 'n1', '--quiet'):
        assert word in arguments
    tool = script.replace('slurm_', '').replace('.sh', '.py')
    command = arguments[arguments.index('python') :]
    assert command == ['python', '-u', str(TOOLS / tool), *files, '--launcher', 'slurm', '--amp', '--work-dir', 'a b']


def test_few_gpus(run):
    arguments = run('slurm_train.sh', 'gpu', 'job', 'c.py', GPUS='2').stdout.splitlines()
    assert '--gres=gpu:2' in arguments and '--ntasks-per-node=2' in arguments


@pytest.mark.parametrize('script', ['slurm_train.sh', 'slurm_test.sh'])
def test_usage(script, run):
    result = run(script, 'gpu', 'job')
    assert result.returncode == 2 and 'usage:' in result.stderr and 'CONFIG' in result.stderr
