"""Build the sdist, and wheels from it, into dist/; install each wheel in a fresh environment and use it there.

A wheel is built for the CPU, and another with the CUDA kernels where nvcc is on PATH.  The fresh environment sees the
packages of this one, but neither this tree nor an mmvmamba that is installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USE = """
import sys, torch, mmvmamba
from mmvmamba.ops import backend_report
assert mmvmamba.__file__.startswith(sys.prefix), mmvmamba.__file__
maps = mmvmamba.VSSMBackbone('nano')(torch.rand(1, 3, 64, 64))
sum(out.square().mean() for out in maps).backward()
compiled = [status.name for status in backend_report() if status.name == 'cpu' and status.available]
assert bool(compiled) == (sys.argv[1] != 'none'), [str(status) for status in backend_report()]
print('mmvmamba', mmvmamba.__version__, 'trains on', *(compiled or ['naive']))
"""


def run(*command, **options) -> None:
    """Run a command; if it fails, show what it said.

    Raises:
        SystemExit: If the command fails.
    """
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if result.returncode:
        raise SystemExit(f'error: {" ".join(map(str, command[:6]))} failed\n{(result.stdout + result.stderr)[-3000:]}')
    print(result.stdout.strip().splitlines()[-1] if result.stdout.strip() else 'done', flush=True)


def build_sdist(folder: Path) -> Path:
    """Build the sdist into a folder; returns its path."""
    script = 'import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))'
    run(sys.executable, '-c', script, folder, cwd=ROOT)
    return next(folder.glob('*.tar.gz'))


def build_wheel(sdist: Path, folder: Path, build: str) -> Path:
    """Build a wheel from the sdist into a folder; returns its path."""
    pip = (sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index')
    run(*pip, '-w', folder, sdist, env={**os.environ, 'MMVMAMBA_BUILD': build})
    return next(folder.glob('*.whl'))


def check_wheel(wheel: Path, build: str) -> None:
    """Install a wheel in a fresh environment, and train one step with it from another folder."""
    clean = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, symlinks=True)
        python = Path(name) / 'bin/python'
        site = next(Path(name).glob('lib/python*/site-packages'))
        run(
            sys.executable,
            '-m',
            'pip',
            '-q',
            '--python',
            python,
            'install',
            '--no-deps',
            '--no-index',
            wheel,
            env=clean,
        )
        # not before: pip would find the mmvmamba of this environment there
        (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
        run(python, '-c', USE, build, cwd=name, env=clean)


def main(argv=None) -> int:
    """Build and check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    default = ['cpu', *(['cuda'] if shutil.which('nvcc') else [])]
    parser.add_argument(
        '--builds', nargs='+', choices=('cpu', 'cuda', 'none'), default=default, help='default: %(default)s'
    )
    parser.add_argument('--out-dir', type=Path, default=ROOT / 'dist', help='default: dist')
    args = parser.parse_args(argv)
    shutil.rmtree(args.out_dir, ignore_errors=True)
    args.out_dir.mkdir(parents=True)
    sdist = build_sdist(args.out_dir.resolve())
    for build in args.builds:
        wheel = build_wheel(sdist, args.out_dir.resolve() / build, build)
        print(f'{wheel.relative_to(args.out_dir.resolve())}, in a fresh environment:')
        check_wheel(wheel, build)
    return 0


if __name__ == '__main__':
    sys.exit(main())
