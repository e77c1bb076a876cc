"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no access out of bounds, nothing undefined."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_tools.conftest import ROOT, STANDARD

SANITIZE = ['-fsanitize=address,undefined', '-fno-sanitize-recover=undefined', '-fno-omit-frame-pointer']


def build(folder: Path) -> None:
    """Compile the kernels with sanitizers into a package of their own: the sources' Python files, another library."""
    package = folder / 'mmvmamba'
    ignore = shutil.ignore_patterns('__pycache__', '.mim', '*.so', 'csrc')
    shutil.copytree(ROOT / 'mmvmamba', package, ignore=ignore)
    shutil.copytree(ROOT / 'ops', package / 'ops', ignore=ignore)
    torch_folder = Path(torch.__file__).parent
    csrc = ROOT / 'ops/csrc'
    includes = [
        f'-I{path}' for path in (csrc, f'{torch_folder}/include', f'{torch_folder}/include/torch/csrc/api/include')
    ]
    sources = [source for source in sorted(csrc.rglob('*.cpp')) if source.stem != 'cuda']
    flags = [STANDARD, '-O1', '-g1', '-fPIC', '-fopenmp', '-fno-math-errno', '-fno-trapping-math', *SANITIZE]
    objects = []
    for source in sources:
        objects.append(folder / f'{len(objects)}.o')
        command = [os.environ.get('CXX', 'g++'), *flags, *includes, '-c', str(source), '-o', str(objects[-1])]
        subprocess.run(command, check=True, capture_output=True, text=True)
    libraries = [f'-L{torch_folder}/lib', '-lc10', '-ltorch_cpu', '-ltorch']
    command = [
        'g++',
        '-shared',
        '-fopenmp',
        *SANITIZE,
        *map(str, objects),
        '-o',
        str(package / 'ops/_C.so'),
        *libraries,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)


def runtime(name: str) -> str:
    """Path of a sanitizer's run-time library, which must be loaded before Python."""
    path = subprocess.run(
        ['g++', f'-print-file-name={name}'], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(path).is_absolute(), f'g++ has no {name}'
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux' or shutil.which('g++') is None, reason='needs g++ on Linux')
def test_cpu_kernels(tmp_path):
    build(tmp_path)
    library = (tmp_path / 'mmvmamba/ops/_C.so').read_bytes()
    assert b'__asan_report_load' in library and b'__ubsan_handle' in library
    environment = {
        **os.environ,
        'LD_PRELOAD': runtime('libasan.so') + ':' + runtime('libubsan.so'),
        'ASAN_OPTIONS': 'detect_leaks=0,verify_asan_link_order=0,halt_on_error=1',
        'UBSAN_OPTIONS': 'print_stacktrace=1,halt_on_error=1',
        'PYTHONPATH': f'{tmp_path}:{ROOT}',
        'PYTHONMALLOC': 'malloc',
        'OMP_NUM_THREADS': '2',
        'PYTHONWARNINGS': 'ignore',
    }
    script = ROOT / 'tests/test_ops/sanitized.py'
    shutil.copy(script, tmp_path / 'sanitized.py')
    result = subprocess.run(
        [sys.executable, str(tmp_path / 'sanitized.py')],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert 'runtime error' not in result.stderr
    assert f'cases through the kernels beside {tmp_path}' in result.stdout
