"""An mmcv without compiled ops: the installed one by links, first on the path of a subprocess."""

import os
import subprocess
import sys
from pathlib import Path

from mmvmamba.mmcv_ops.placing import mmcv_folder


def make_overlay(folder: Path) -> Path:
    """``folder/mmcv``, linked to the installed mmcv file by file, but for any ``_ext``."""
    overlay = folder / 'mmcv'
    overlay.mkdir(parents=True)
    for path in mmcv_folder().iterdir():
        if not path.name.startswith('_ext') and path.name != '__pycache__':
            (overlay / path.name).symlink_to(path)
    return overlay


def run(command: list, overlay: Path, **options) -> subprocess.CompletedProcess:
    """Run a command that finds the overlay's mmcv first; ``env`` adds to the environment."""
    env = {'PYTHONPATH': str(overlay.parent), **options.pop('env', {})}
    return run_installed(command, env=env, **options)


def run_installed(command: list, env: dict, **options) -> subprocess.CompletedProcess:
    """Run a command with the installed mmcv; ``env`` adds to the environment."""
    environment = {**os.environ, **env}
    environment.pop('PYTEST_CURRENT_TEST', None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def run_python(code: str, overlay: Path, **options) -> subprocess.CompletedProcess:
    """:func:`run` a piece of Python."""
    return run([sys.executable, '-W', 'ignore', '-c', code], overlay, **options)
