"""Set up the tested environment: a virtual environment, the exact packages, and this package with its kernels.

Run by ``make setup``; needs nothing but Python.  Each finished step leaves a stamp in the environment, so that a second
run does nothing and an interrupted one goes on where it stopped.  ``--mmcv compiled`` takes an older torch and builds
mmcv with its own ops against it.
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


def check_machine(folder: Path, mmcv: str) -> None:
    """Check what the steps below can't do without; without a compiler only mmcv's own ops are out of reach."""
    if not PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        raise SetupError(
            f'Python is {sys.version.split()[0]}, but the tested set needs 3.11 to 3.13 (3.11 is tested). '
            'Choose one: make setup PYTHON=python3.11'
        )
    compiler = os.environ.get('CXX', 'c++').split()[0]
    if shutil.which(compiler) is None:
        missing = f'no C++ compiler: {compiler!r} is not on PATH'
        install = 'Install one (Debian: apt-get install g++; or set CXX)'
        if mmcv == 'compiled':
            raise SetupError(f'{missing}, and mmcv is built from source. {install} and run this again')
        say(f'{missing}. Everything works but the compiled extension; for its speed: {install} and run this again')
    free = shutil.disk_usage(folder).free / 2**30
    if free < DISK_GIB and not (folder / '.venv').exists():
        raise SetupError(f'{free:.0f} GiB are free in {folder}, but the environment needs about {DISK_GIB}')


def run(step: str, command: list, advice: str, watch=None, **environment) -> None:
    """Run a command quietly; if it fails, show the end of what it said and what to do. ``watch`` is given each line."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if watch:
            watch(line)
    if process.wait() == 0:
        return
    output = ''.join(said)
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith('WARNING')]
    print('\n'.join(lines[-25:]), file=sys.stderr)
    if re.search(
        r'NewConnectionError|ConnectTimeout|name resolution|Connection refused|ProxyError|Max retries', output
    ):
        advice = 'The package index cannot be reached: check the network (or PIP_INDEX_URL), then run this again'
    elif 'No space left' in output:
        advice = 'The disk is full: free some space, then run this again'
    raise SetupError(f'{step} failed (exit code {process.returncode}). {advice}')


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

    def pip(self, step: str, *arguments: str, advice: str = 'See the messages above', **options) -> None:
        """Run pip in the environment."""
        run(step, [str(self.python), '-m', 'pip', '--disable-pip-version-check', *arguments], advice, **options)

    def imports(self, module: str) -> bool:
        """Whether a module can be imported there."""
        return (
            subprocess.run([self.python, '-c', f'import {module}'], capture_output=True, cwd=self.folder).returncode
            == 0
        )


def say(message: str) -> None:
    """Print a line now."""
    print(f'[setup] {message}', flush=True)


def package_files(mmcv: str, gpu: bool) -> list:
    """The requirement files that are installed, the largest packages first."""
    if mmcv == 'compiled':
        return ['compiled', 'tested', 'dev']
    return ['torch', *(['gpu'] if gpu else []), 'tested', 'mmcv-lite', 'dev']


def install_packages(env: Environment, files: list) -> None:
    """Install the exact set, asking for nothing beyond it; Python compiles what it imports, when it does.

    uv needs a third of pip's processor time.  pip goes on where uv can't, as with wheels that lie on a disk.
    """
    build = str(REQUIREMENTS / 'build.txt')
    env.pip('installing requirements/build.txt', 'install', '--no-deps', '--no-compile', '-r', build)
    compiled = env.folder / '.done-mmcv'
    if compiled.exists() and 'mmcv-lite' in files:  # both write into one folder
        env.pip('removing compiled mmcv', 'uninstall', '-y', 'mmcv')
        compiled.unlink()
    what = 'installing ' + ', '.join(f'requirements/{name}.txt' for name in files)
    options = ['--no-deps', '--no-build-isolation']
    options += [word for name in files for word in ('-r', str(REQUIREMENTS / f'{name}.txt'))]
    command = [str(env.python), '-m', 'uv', 'pip', 'install', '--python', str(env.python), *options]
    try:
        run(what, command, 'See the messages above', **uv_settings(env))
    except SetupError:
        say('uv could not; pip goes on, which takes longer')
        env.pip(what, 'install', '--no-compile', *options)


def uv_settings(env: Environment) -> dict:
    """The index that pip was told of, for uv, which does not read pip's settings."""
    command = [env.python, '-m', 'pip', 'config', 'get', 'global.index-url']
    asked = os.environ.get('PIP_INDEX_URL') or subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {'UV_DEFAULT_INDEX': asked} if asked and 'UV_DEFAULT_INDEX' not in os.environ else {}


def install_mmcv(env: Environment) -> None:
    """Build mmcv with its ops; a wheel that pip cached for another torch does not load and is built again."""
    # without debug symbols the compiler needs less than half the time
    flags = dict(MMCV_WITH_OPS='1', CFLAGS=f'{os.environ.get("CFLAGS", "")} -g0', MAX_JOBS=str(os.cpu_count() or 1))
    env.pip('removing mmcv-lite', 'uninstall', '-y', 'mmcv-lite')  # its files lie where mmcv's go
    for options in ((), ('--no-cache-dir', '--force-reinstall')):
        env.pip(
            'building mmcv',
            *('install', '--no-deps', '--no-build-isolation', *options, '-r', str(REQUIREMENTS / 'mmcv.txt')),
            advice='mmcv 2.1 needs a C++17 compiler; the messages above name the file that failed',
            **flags,
        )
        if env.imports('mmcv.ops'):
            return
    raise SetupError('mmcv was built, but its ops cannot be imported. Remove .venv and run this again')


def gpu_is_there() -> bool:
    """Whether the machine has an NVIDIA GPU that runs."""
    return bool(shutil.which('nvidia-smi')) and subprocess.run(['nvidia-smi'], capture_output=True).returncode == 0


class BuildProgress:
    """Says how far the compiler is and how long it will take, from the lines of ninja and setup.py."""

    def __init__(self):
        self.start = self.said = time.time()

    def __call__(self, line: str) -> None:
        """Read a line of pip's output."""
        if line.lstrip().startswith('mmvmamba:'):
            say('  ' + line.strip())
        step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
        now = time.time()
        if step and now - self.said > 5:
            done, total = map(int, step.groups())
            left = (now - self.start) * (total - done) / done
            self.said = now
            say(f'  {done} of {total} files compiled, about {left:.0f} s left')


def install_package(env: Environment) -> None:
    """Install mmvmamba in place and compile its kernels; its stand-in for mmcv's ops yields to compiled ones."""
    command = ('-v', 'install', '--no-deps', '--no-build-isolation', '-e', '.')
    env.pip('installing mmvmamba', *command, watch=BuildProgress())
    # by itself, since importing mmvmamba imports torch and mmengine
    place, folder = [str(env.python), '-m', 'mmcv_ops', 'place'], str(ROOT / 'mmvmamba')
    run("placing the stand-in for mmcv's ops", place, 'See the messages above', PYTHONPATH=folder)


def main() -> int:
    """Set up the environment; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv', help='where the environment lies (default: .venv)')
    parser.add_argument(
        '--mmcv', choices=('lite', 'compiled'), default='lite', help="mmcv's ops: over torchvision's, or built (long)"
    )
    args = parser.parse_args()
    env, cores, gpu = Environment(args.venv.resolve()), os.cpu_count() or 1, gpu_is_there()
    files = package_files(args.mmcv, gpu or shutil.which('nvcc') is not None)  # nvcc reads their headers
    try:
        check_machine(ROOT, args.mmcv)
        env.create()
        env.step(
            'packages',
            digest(*(REQUIREMENTS / f'{name}.txt' for name in ('build', *files)), extra=args.mmcv),
            'installing torch, OpenMMLab and the rest (about 1 minute beside 3 GB of downloads)',
            lambda: install_packages(env, files),
        )
        if args.mmcv == 'compiled':
            env.step(
                'mmcv',
                digest(REQUIREMENTS / 'mmcv.txt', REQUIREMENTS / 'compiled.txt'),
                f'building mmcv with its ops on {cores} cores (about {max(1, 16 // cores)} minutes, seconds if pip has '
                'its wheel cached)',
                lambda: install_mmcv(env),
            )
        sources = sorted(path for path in (ROOT / 'ops/csrc').rglob('*') if path.is_file())
        build = ' '.join(os.environ.get(name, '') for name in ('MMVMAMBA_BUILD', 'TORCH_CUDA_ARCH_LIST', 'CXX'))
        env.step(
            'mmvmamba',
            digest(
                *(ROOT / name for name in ('setup.py', 'mmvmamba/version.py', 'mmvmamba/mmcv_ops/placing.py')),
                *sources,
                extra=f'{ROOT} {build} {gpu} {files} {shutil.which(os.environ.get("CXX", "c++").split()[0])}',
            ),
            'installing mmvmamba in place and compiling its kernels (about 1 minute for a CPU)',
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
