"""tools/dist.py: sdist and wheel are whole and run in a fresh environment; the recipe of CI is well formed."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))


def build(folder, which):
    command = [sys.executable, str(ROOT / 'tools/dist.py'), '--builds', which, '--out-dir', str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_wheel_without_kernels_runs_in_a_fresh_environment(tmp_path):
    said = build(tmp_path / 'dist', 'none')
    assert 'trains on naive' in said
    with tarfile.open(next((tmp_path / 'dist').glob('*.tar.gz'))) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
    assert {'setup.py', 'ops/csrc/common/autograd.h', 'configs/demo/vmamba-nano_1xb64_digits-32px.py'} <= names
    assert not [name for name in names if name.endswith(('.so', '.pyc'))]


@pytest.mark.slow
def test_a_wheel_with_kernels_runs_in_a_fresh_environment(tmp_path):
    assert 'trains on cpu' in build(tmp_path / 'dist', 'cpu')


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_well_formed(path):
    """What actionlint checks of a file this small: keys, pinned actions, and make targets that exist."""
    recipe = yaml.safe_load(path.read_text())
    assert set(recipe) <= {'name', True, 'permissions', 'jobs', 'concurrency'} and recipe[True]  # YAML 1.1 reads `on`
    targets = {line.split(':')[0] for line in (ROOT / 'Makefile').read_text().splitlines() if ':' in line}
    for name, job in recipe['jobs'].items():
        assert set(job) <= {'runs-on', 'steps', 'needs', 'if', 'permissions', 'environment'}, name
        for step in job['steps']:
            assert ('uses' in step) != ('run' in step) and set(step) <= {'uses', 'run', 'with', 'name', 'if', 'env'}
            if 'uses' in step:
                action, _, version = step['uses'].partition('@')
                assert action.startswith('actions/') and version.startswith('v'), step
            else:
                for line in step['run'].splitlines():
                    assert not line.startswith('make ') or set(line.split()[1:]) <= targets, line


def test_there_is_a_workflow():
    assert WORKFLOWS
