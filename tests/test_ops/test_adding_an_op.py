"""CONTRIBUTING's six steps give an op: that of ``tests/data/scale_rows``, added to a copy of the tree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from mmvmamba.ops import backend_report
from tests.test_tools.conftest import ROOT, STANDARD

OP = 'scale_rows'
EXAMPLE = ROOT / 'tests/data' / OP
CPU = next(status for status in backend_report() if status.name == 'cpu')
NEW_SOURCES = [f'ops/csrc/{OP}/autograd.cpp', f'ops/csrc/{OP}/cpu.cpp']
LIST_SOURCES = (
    'import json, runpy, setuptools; setuptools.setup = lambda **_: None\n'
    "print(json.dumps(runpy.run_path('setup.py')['find_sources']('cpu')))"
)


def steps():
    """The steps of CONTRIBUTING, and the paths that they name."""
    text = (ROOT / 'CONTRIBUTING.md').read_text().partition('## Adding an op\n')[2].partition('\n## ')[0]
    found = re.findall(r'^(\d)\. (.+(?:\n   .+)*)', text, re.MULTILINE)
    assert [number for number, _ in found] == list('123456')
    return [
        path for _, step in found for path in re.findall(r'`((?:(?:ops|tests|docs)/|[A-Z])[\w<>/]*(?:/|\.\w+))`', step)
    ]


def test_the_example_is_what_the_steps_name():
    named = [path.replace('<op>', OP) for path in steps()]
    new, existing = ([path for path in named if (OP in path) is is_new] for is_new in (True, False))
    files = {str(path.relative_to(EXAMPLE)) for path in EXAMPLE.rglob('*') if path.is_file() and path.suffix != '.pyc'}
    assert {path for path in files if not path.startswith('tests/')} == {path for path in new if path[-1] != '/'}
    assert any(path.startswith(f'tests/test_ops/{OP}/') for path in files) and f'tests/test_ops/{OP}/' in new
    assert 0 < len(existing) <= 3 and all((ROOT / path).is_file() for path in existing)


def add_the_op(tree: Path) -> None:
    """Copy the tree, with the example in it; of the files that were there one changes what runs."""
    ignore = shutil.ignore_patterns('__pycache__', '.mim', 'data', 'test_[!o]*')
    for name in ('mmvmamba', 'ops', 'tests'):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ('setup.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, tree)
    (tree / 'mmvmamba/ops').symlink_to('../ops')
    shutil.copytree(EXAMPLE, tree, dirs_exist_ok=True)
    exports = tree / 'ops/__init__.py'
    text = exports.read_text().replace('__all__ = [', f"from .{OP}.interface import {OP}\n\n__all__ = [\n    '{OP}',")
    exports.write_text(text)


def build(tree: Path) -> None:
    """Compile what is new, and link it with what is compiled already."""
    result = subprocess.run([sys.executable, '-c', LIST_SOURCES], cwd=tree, capture_output=True, text=True, check=True)
    sources = json.loads(result.stdout)
    assert [source for source in sources if not (ROOT / source).exists()] == NEW_SOURCES
    includes = [f'-I{path}' for path in ('ops/csrc', *cpp_extension.include_paths())]
    flags = [
        STANDARD,
        '-O0',
        '-fPIC',
        '-fopenmp',
        f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}',
    ]
    for source in NEW_SOURCES:
        command = [os.environ.get('CXX', 'c++'), *flags, *includes, '-c', source, '-o', f'{Path(source).stem}.o']
        result = subprocess.run(command, cwd=tree, env=os.environ, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
    (compiled,) = tree.glob('ops/_C*.so')
    compiled.rename(tree / 'ops/compiled.so')
    link = ['-shared', '-fopenmp', 'autograd.o', 'cpu.o', '-Wl,--no-as-needed', '-Wl,-rpath,$ORIGIN', 'ops/compiled.so']
    libraries = [f'-L{path}' for path in cpp_extension.library_paths()] + ['-lc10', '-ltorch_cpu', '-ltorch']
    command = [os.environ.get('CXX', 'c++'), *link, *libraries, '-o', 'ops/_C.so']
    result = subprocess.run(command, cwd=tree, env=os.environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.skipif(not CPU.available, reason=CPU.reason)
def test_the_steps_give_an_op():
    """Forward, backward, opcheck, and the Triton kernels by Triton's interpreter, by the example's own tests."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        add_the_op(tree)
        build(tree)
        environment = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': str(tree)}
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'tests/test_ops/{OP}']
        result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
        assert '5 passed' in result.stdout or '4 passed, 1 skipped' in result.stdout, result.stdout[-1000:]
