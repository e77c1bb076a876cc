"""Set up the tested environment: a virtual environment, the exact packages, mmcv with its ops, and this package.

Run by ``make setup``; needs nothing but Python.  Each finished step leaves a stamp in the environment, so that a second
run does nothing and an interrupted one goes on where it stopped.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / 'requirements'
DISK_GIB = 12
PYTHONS = ((3, 11), (3, 14))  # the tested set has wheels for these


class SetupError(Exception):
    """A step failed; the message says which one and what to do."""


def check_machine(folder: Path) -> None:
    """Check what the steps below can't do without."""
    if not PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        raise SetupError(
            f'Python is {sys.version.split()[0]}, but the tested set needs 3.11 to 3.13 (3.11 is tested). '
            'Choose one: make setup PYTHON=python3.11'
        )
    compiler = os.environ.get('CXX', 'c++').split()[0]
    if shutil.which(compiler) is None:
        raise SetupError(
            f'no C++ compiler: {compiler!r} is not on PATH, and mmcv is built from source. '
            'Install one (Debian: apt-get install g++; or set CXX) and run this again'
        )
    free = shutil.disk_usage(folder).free / 2**30
    if free < DISK_GIB and not (folder / '.venv').exists():
        raise SetupError(f'{free:.0f} GiB are free in {folder}, but the environment needs about {DISK_GIB}')


def run(step: str, command: list, advice: str, **environment) -> None:
    """Run a command quietly; if it fails, show the end of what it said and what to do."""
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode == 0:
        return
    lines = [line for line in result.stdout.splitlines() if line.strip() and not line.startswith('WARNING')]
    print('\n'.join(lines[-25:]), file=sys.stderr)
    if re.search(
        r'NewConnectionError|ConnectTimeout|name resolution|Connection refused|ProxyError|Max retries', result.stdout
    ):
        advice = 'The package index can not be reached: check the network (or PIP_INDEX_URL), then run this again'
    elif 'No space left' in result.stdout:
        advice = 'The disk is full: free some space, then run this again'
    raise SetupError(f'{step} failed (exit code {result.returncode}). {advice}')


def digest(*paths: Path, extra: str = '') -> str:
    """Hash of the files that a step depends on."""
    value = hashlib.sha256(extra.encode())
    for path in paths:
        value.update(path.read_bytes())
    return value.hexdigest()[:16]


class Environment:
    """A virtual environment with stamps of the steps that are done."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / ('Scripts' if os.name == 'nt' else 'bin') / 'python'

    def create(self) -> None:
        """Make the environment; one that an interrupted run left unusable is made anew."""
        usable = (
            self.python.exists()
            and subprocess.run([self.python, '-m', 'pip', '--version'], capture_output=True).returncode == 0
        )
        if not usable:
            say(f'making the virtual environment {self.folder}')
            venv.create(self.folder, clear=True, with_pip=True, symlinks=os.name != 'nt')

    def step(self, name: str, key: str, what: str, action) -> None:
        """Do a step unless its stamp says that it is done."""
        stamp = self.folder / f'.done-{name}'
        if stamp.exists() and stamp.read_text() == key:
            return
        say(what)
        start = time.time()
        stamp.unlink(missing_ok=True)
        action()
        stamp.write_text(key)
        say(f'  done in {time.time() - start:.0f} s')

    def pip(self, step: str, *arguments: str, advice: str = 'See the messages above', **environment) -> None:
        """Run pip in the environment."""
        run(step, [str(self.python), '-m', 'pip', '--disable-pip-version-check', *arguments], advice, **environment)

    def imports(self, module: str) -> bool:
        """Whether a module can be imported there."""
        return (
            subprocess.run([self.python, '-c', f'import {module}'], capture_output=True, cwd=self.folder).returncode
            == 0
        )


def say(message: str) -> None:
    """Print a line now."""
    print(f'[setup] {message}', flush=True)


def install_packages(env: Environment) -> None:
    """Install the exact set, asking pip for nothing beyond it."""
    for name in ('build', 'tested', 'dev'):
        env.pip(f'installing requirements/{name}.txt', 'install', '--no-deps', '-r', str(REQUIREMENTS / f'{name}.txt'))


def install_mmcv(env: Environment) -> None:
    """Build mmcv with its ops; a wheel that pip cached for another torch does not load and is built again."""
    # without debug symbols the compiler needs less than half the time
    flags = dict(MMCV_WITH_OPS='1', CFLAGS=f'{os.environ.get("CFLAGS", "")} -g0', MAX_JOBS=str(os.cpu_count() or 1))
    advice = (
        'mmcv 2.1 needs a C++17 compiler and torch <= 2.12 (later headers need C++20); the messages above name the '
        'file that failed'
    )
    for options in ((), ('--no-cache-dir', '--force-reinstall')):
        env.pip(
            'building mmcv',
            'install',
            '--no-deps',
            '--no-build-isolation',
            *options,
            '-r',
            str(REQUIREMENTS / 'mmcv.txt'),
            advice=advice,
            **flags,
        )
        if env.imports('mmcv.ops'):
            return
    raise SetupError('mmcv was built, but its ops can not be imported. Remove .venv and run this again')


def install_package(env: Environment) -> None:
    """Install mmvmamba in place and compile its kernels."""
    gpu = shutil.which('nvidia-smi') and subprocess.run(['nvidia-smi'], capture_output=True).returncode == 0
    build = os.environ.get('MMVMAMBA_BUILD') or ('' if gpu else 'cpu')
    env.pip('installing mmvmamba', 'install', '--no-deps', '--no-build-isolation', '-e', '.', MMVMAMBA_BUILD=build)


def main() -> int:
    """Set up the environment; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv', help='where the environment lies (default: .venv)')
    env = Environment(parser.parse_args().venv.resolve())
    cores = os.cpu_count() or 1
    try:
        check_machine(ROOT)
        env.create()
        env.step(
            'packages',
            digest(*(REQUIREMENTS / f'{name}.txt' for name in ('build', 'tested', 'dev'))),
            'installing torch, OpenMMLab and the rest (about 3 minutes, 3 GB of downloads)',
            lambda: install_packages(env),
        )
        env.step(
            'mmcv',
            digest(REQUIREMENTS / 'mmcv.txt', REQUIREMENTS / 'tested.txt'),
            f'building mmcv with its ops on {cores} cores (about {max(1, 30 // cores)} minutes, seconds if pip has '
            'its wheel cached)',
            lambda: install_mmcv(env),
        )
        sources = sorted(path for path in (ROOT / 'ops/csrc').rglob('*') if path.is_file())
        env.step(
            'mmvmamba',
            digest(
                ROOT / 'setup.py',
                ROOT / 'mmvmamba/version.py',
                *sources,
                extra=f'{ROOT} {os.environ.get("MMVMAMBA_BUILD")}',
            ),
            'installing mmvmamba in place and compiling its kernels (about 1 minute)',
            lambda: install_package(env),
        )
    except SetupError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2  # as the tools that can import mmvmamba.cli
    except KeyboardInterrupt:
        print('[setup] interrupted; run it again to go on', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
