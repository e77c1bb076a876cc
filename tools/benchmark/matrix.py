"""Try environments of several versions: install, compare the ops, train one step of each codebase, run mim.

Each environment is made in build/matrix/ with uv and removed again, about 5 GiB at a time; what is to be installed is
fetched once for rows of one torch.  A row that fails says why and the next one is tried; a second run goes on where the
first stopped, if the commit is the same or --keep is given.  Writes benchmarks/results/matrix.json, which README shows.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import report
import torch

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / 'build/matrix'
UV = 'uv==0.13.9'
TOOLS = ('setuptools>=77,<82', 'wheel', 'ninja')
OTHERS = ('ftfy', 'regex', 'scikit-learn', 'matplotlib', 'pycocotools', 'opencv-python-headless')
# what OpenMMLab's tools ask for, and what serves: see "known traps" of the doctor
OVERRIDES = ("opencv-python; python_version < '3'", 'setuptools>=77,<82', 'transformers<5')
SETS = {
    'original': {
        'mmengine': 'mmengine==0.10.7',
        'mmcv': 'mmcv-lite==2.1.0',
        'mmpretrain': 'mmpretrain==1.2.0',
        'mmdet': 'mmdet==3.3.0',
        'mmseg': 'mmsegmentation==1.2.2',
        'mim': 'openmim==0.3.9',
    },
    'onedl': {
        'mmengine': 'onedl-mmengine==0.10.12',
        'mmcv': 'onedl-mmcv==2.3.6',
        'mmpretrain': 'onedl-mmpretrain==1.3.6',
        'mmdet': 'onedl-mmdetection==3.5.1',
        'mmseg': 'onedl-mmsegmentation==1.4.2',
        'mim': 'onedl-mim==0.5.1',
    },
}
TASKS = {'mmpretrain': 'classifier', 'mmdet': 'mask_rcnn', 'mmseg': 'upernet'}
PASSES, FAILS = 'passes', '**fails**'


@dataclass(frozen=True)
class Row:
    """An environment.

    Attributes:
        python (str): Such as ``3.12``.
        torch (str): Its release; torchvision follows from it.
        numpy (str): What numpy must satisfy.
        openmmlab (str): A key of ``SETS``.
        build (str): ``MMVMAMBA_BUILD``.
    """

    python: str
    torch: str
    numpy: str
    openmmlab: str = 'original'
    build: str = 'none'


ROWS = (
    Row('3.10', '2.4.1', '==1.26.4', build='cpu'),
    Row('3.12', '2.7.1', '==1.26.4'),
    Row('3.11', '2.11.0', '>=2'),
    Row('3.12', '2.11.0', '>=2', 'onedl'),
    Row('3.11', '2.14.1', '>=2'),
    Row('3.13', '2.15.0', '>=2', build='cpu'),
    Row('3.13', '2.15.0', '>=2', 'onedl'),
    Row('3.14', '2.15.0', '>=2'),
)


class StepError(Exception):
    """A command failed; the message is the reason."""


def reason(output: str) -> str:
    """The line of a command's output that says what went wrong, without the folders of this machine."""
    lines = [line.strip(' ×╰─▶│') for line in output.splitlines() if line.strip()] or ['it said nothing']
    errors = [line for line in lines if re.match(r'(\w+\.)*\w*(Error|Exception|error|Interrupt)\b', line)]
    line = re.sub(r'(?:/[\w.+-]+){2,}/', '', (errors or lines)[-1])
    return (line if len(line) <= 200 else line[:197] + '...').replace('|', '/')


def run(*command, folder: Path = PLACE, minutes: float = 30, **environment) -> str:
    """Run a command outside the repository; returns what it printed.

    Raises:
        StepError: If it fails or takes too long.
    """
    # without bytecode every process would compile torch again
    clean = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'PYTHONDONTWRITEBYTECODE')}
    clean.update(UV_CACHE_DIR=str(PLACE / 'cache'), PYTHONWARNINGS='ignore', **environment)
    try:
        result = subprocess.run(
            [str(word) for word in command],
            cwd=folder,
            env=clean,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            timeout=60 * minutes,
        )
    except subprocess.TimeoutExpired:
        raise StepError(f'took longer than {minutes:g} minutes') from None
    with (PLACE / 'log.txt').open('a') as log:
        log.write(f'\n$ {" ".join(map(str, command))}\n{result.stdout}')
    if result.returncode:
        raise StepError(reason(result.stdout))
    return result.stdout


def find_uv() -> str:
    """uv's path; it is installed beside the environments where it is not on PATH."""
    folder = PLACE / 'uv'
    if shutil.which('uv') is None and not (folder / 'bin/uv').exists():
        venv.create(folder, with_pip=True, clear=True)
        run(folder / 'bin/python', '-m', 'pip', '-q', 'install', UV)
    return shutil.which('uv') or str(folder / 'bin/uv')


def find_python(version: str) -> Optional[str]:
    """An interpreter on PATH or among pyenv's that runs, and has the headers that the extension needs."""
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv'))
    found = [shutil.which(f'python{version}'), *sorted(pyenv.glob(f'versions/{version}.*/bin/python'))]
    script = "import sysconfig; open(sysconfig.get_path('include') + '/Python.h')"
    for path in filter(None, found):
        if subprocess.run([path, '-c', script], capture_output=True).returncode == 0:
            return str(path)
    return None


def build_sdist() -> Path:
    """The package as it is to be installed; a build in the repository would find what an earlier one left there."""
    shutil.rmtree(PLACE / 'sdist', ignore_errors=True)
    (PLACE / 'sdist').mkdir()
    script = 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])'
    run(sys.executable, '-c', script, PLACE / 'sdist', folder=ROOT)
    return next((PLACE / 'sdist').glob('*.tar.gz'))


def install(row: Row, folder: Path, sdist: Path) -> Path:
    """Make a row's environment; returns its interpreter."""
    uv, python = find_uv(), folder / 'bin/python'
    try:  # uv fetches an interpreter that is not there, where it can
        run(uv, 'venv', '--clear', '--python', find_python(row.python) or row.python, folder)
    except StepError as error:
        raise StepError(f'Python {row.python} is not on this machine, and cannot be fetched') from error
    (PLACE / 'overrides.txt').write_text('\n'.join(OVERRIDES))
    pip = (uv, 'pip', 'install', '--python', python, '--override', PLACE / 'overrides.txt')
    base = (f'torch=={row.torch}', 'torchvision', f'numpy{row.numpy}', *TOOLS)
    run(*pip, *base)
    run(*pip, '--no-build-isolation', *base, *SETS[row.openmmlab].values(), *OTHERS, MMCV_WITH_OPS='0')
    # uv's cache does not know for which torch a wheel was built
    run(*pip, '--no-cache', '--no-deps', '--no-build-isolation', sdist, MMVMAMBA_BUILD=row.build)
    run(python, '-m', 'mmvmamba.mmcv_ops', 'place')
    return python


def try_row(row: Row, sdist: Path) -> dict:
    """Make an environment, use it and remove it; returns the row of the table."""
    folder, work = PLACE / f'python{row.python}-torch{row.torch}-{row.openmmlab}', PLACE / 'work'
    cells, remarks = {'Python': row.python, 'torch': row.torch}, []
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()

    def attempt(what: str, value: str, *command, **environment) -> None:
        try:
            said = run(*command, folder=work, **environment)
            cells[what] = value or said.strip().splitlines()[-1]
        except StepError as error:
            cells[what] = FAILS
            remarks.append(f'{what}: {error}')

    try:
        python = install(row, folder, sdist)
        names = [re.split('==', name)[0] for name in SETS[row.openmmlab].values()]
        script = 'import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))'
        versions = run(python, '-c', script, 'numpy', *names).split()[-1 - len(names) :]
        labels = [f'{name.partition("-")[0]} ' if name.startswith('onedl') else '' for name in names]
        cells.update(numpy=versions[0], mmengine=labels[0] + versions[1], mmcv=labels[1] + versions[2])
        attempt('ops', '', python, Path(__file__).resolve(), '--check-ops')
        steps = ROOT / 'tests/test_mmcv_ops/train_steps.py'
        for (codebase, task), label, version in zip(TASKS.items(), labels[2:], versions[3:]):
            attempt(codebase, label + version, python, steps, task, '1')
        demo = next(folder.glob('lib/python*/site-packages/mmvmamba/.mim/tools/demo.py'))
        attempt('mim train, test', PASSES, python, demo, '--quick', '--tasks', 'detection')
        attempt('doctor', 'no trap', python, '-m', 'mmvmamba.doctor')
    except StepError as error:
        remarks.append(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
    return dict(cells, remarks='; '.join(remarks))


def check_ops() -> str:
    """Compare the backends' outputs and gradients with the naive one in float64; returns each one's largest error."""
    from mmvmamba import ops

    def values(op, backend, dtype):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        if op is ops.selective_scan:
            inputs = [draw(2, 8, 37), draw(2, 8, 37), -draw(8, 2).exp(), draw(2, 4, 2, 37), draw(2, 4, 2, 37)]
            options = dict(delta_softplus=True)
        else:
            inputs = [draw(2, 8, 7, 5), draw(4, 4, 8), draw(4, 8, 2), draw(4, 8), draw(32, 1).abs().log(), draw(32)]
            options = {}
        inputs = [value.to(dtype).requires_grad_() for value in inputs]
        out = op(*inputs, **options, backend=backend)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    found = []
    for backend in [status.name for status in ops.backend_report() if status.available]:
        worst = 0.0
        for op in (ops.selective_scan, ops.ss2d_scan):
            truth = values(op, 'naive', torch.float64)
            got = values(op, backend, torch.float32)
            worst = max(worst, *(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, truth)))
        if not worst < 1e-5:
            raise SystemExit(f'Error: {backend} differs from naive by {worst:.0e}')
        found.append(backend)
    return ', '.join(found)


def main(argv=None) -> int:
    """Try every row; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'benchmarks/results/matrix.json', help='default: %(default)s'
    )
    parser.add_argument('--keep', action='store_true', help='keep what was found at earlier commits')
    parser.add_argument('--check-ops', action='store_true', help='compare the ops of this environment, and no more')
    args = parser.parse_args(argv)
    if args.check_ops:
        print(check_ops())
        return 0
    PLACE.mkdir(parents=True, exist_ok=True)
    sdist, found, fetched = build_sdist(), [], None
    for row in ROWS:
        name = f'Python {row.python}, torch {row.torch}, {row.openmmlab}'
        kept = PLACE / f'{"-".join(asdict(row).values())}.json'.replace('=', '').replace('>', '')
        if not kept.exists() or not (args.keep or json.loads(kept.read_text())['commit'] == report.commit()):
            if fetched != row.torch:
                shutil.rmtree(PLACE / 'cache', ignore_errors=True)
            fetched, start = row.torch, time.time()
            print(f'[matrix] {name}', flush=True)
            result = try_row(row, sdist)
            kept.write_text(json.dumps(dict(commit=report.commit(), row=result)))
            print(f'[matrix]   {time.time() - start:.0f} s: {result}', flush=True)
        result = json.loads(kept.read_text())
        found.append(dict(result['row'], commit=result['commit']))
    report.write(args.out, 'cpu', found)
    shutil.rmtree(PLACE / 'cache', ignore_errors=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
