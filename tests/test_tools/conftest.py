"""A small digits data set, and how to run the tools as a user would: in processes of their own, from another folder."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name):
    """Import a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / 'tools' / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='session')
def tool():
    """Function that imports a script of tools/."""
    return load_tool


@pytest.fixture(scope='session')
def user_folder(tmp_path_factory):
    """A folder outside the repository with a small data set where the demo configs expect it."""
    folder = tmp_path_factory.mktemp('user')
    arguments = ['--num-train', '8', '--num-val', '4', '--image-size', '64', '--out-dir', str(folder / 'data/digits')]
    assert load_tool('dataset_converters/digits.py').main(arguments) == 0
    return folder


@pytest.fixture(scope='session')
def run(user_folder):
    """Function (command line, more arguments, ok=True) that runs a command there and returns what it printed."""

    def run_there(command, *arguments, ok=True, **environment):
        words = [sys.executable if word == 'python' else word for word in command.split()]
        result = subprocess.run(
            [*words, *arguments],
            cwd=user_folder,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert (result.returncode == 0) is ok, (result.stdout + result.stderr)[-4000:]
        return result.stdout + result.stderr

    return run_there
