"""A small digits data set, and how to run the tools as a user would: in processes of their own, from another folder."""

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
STANDARD = '-std=c++20' if tuple(map(int, torch.__version__.split('.')[:2])) > (2, 12) else '-std=c++17'


@functools.cache  # the ops that a script defines go when one of two modules of it does
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


def make_user_folder(folder, environment=os.environ):
    """Fill a folder outside the repository with a small data set where the demo configs expect it."""
    script = [sys.executable, str(ROOT / 'tools/dataset_converters/digits.py')]
    sizes = ['--num-train', '8', '--num-val', '4', '--image-size', '64', '--out-dir', str(folder / 'data/digits')]
    result = subprocess.run([*script, *sizes], env=dict(environment), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def runner_in(folder, environment=os.environ):
    """Function (command line, more arguments, ok=True) that runs a command there and returns what it printed."""

    def run_there(command, *arguments, ok=True, **own_environment):
        words = [sys.executable if word == 'python' else word for word in command.split()]
        result = subprocess.run(
            [*words, *arguments],
            cwd=folder,
            env={**environment, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', **own_environment},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert (result.returncode == 0) is ok, (result.stdout + result.stderr)[-4000:]
        return result.stdout + result.stderr

    return run_there


@contextlib.contextmanager
def place_of_its_own():
    """The same for a test in the background: a folder, and the function that runs commands there."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_user_folder(Path(name), os.environ)
        yield folder, runner_in(folder, os.environ)


@pytest.fixture(scope='session')
def user_folder(tmp_path_factory):
    """A folder outside the repository with a small data set; of several worker processes, one makes it for all."""
    folder = tmp_path_factory.mktemp('user')
    if 'PYTEST_XDIST_WORKER' not in os.environ:
        return make_user_folder(folder)
    shared = tmp_path_factory.getbasetemp().parent / 'user'
    with FileLock(f'{shared}.lock'):
        if not shared.exists():
            make_user_folder(shared)
    return shutil.copytree(shared, folder, dirs_exist_ok=True)


@pytest.fixture(scope='session')
def run(user_folder):
    """What :func:`runner_in` gives for it."""
    return runner_in(user_folder)
