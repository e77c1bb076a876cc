"""Every module can be the first import of a process, needs no mmcv, and imports only from the floors below."""

import json
import subprocess
import sys

import pytest

from tests.test_tools.conftest import ROOT

# A process that has imported what takes long, but nothing of the project, forks before each import: a module is
# imported where only the packages around it were, as if it were the first. What the package's own __init__.py imports
# is left out, since its order could hide a circle; with it, one more process imports everything.
FIRST_IMPORTS = """
import importlib.util, json, os, sys, traceback
import mmengine, mmengine.runner, mmengine._strategy, numpy, torch, torch._dynamo, torch.distributed.fsdp
import torch.utils._triton, torch.utils.flop_counter

modules, root = json.loads(sys.argv[1]), 'mmvmamba'
sys.modules['mmcv'] = None  # which the package does without: importing it fails
assert not any(name.startswith(root) for name in sys.modules)


def attempt(name):
    try:
        importlib.import_module(name)
    except BaseException as caught:
        if not isinstance(caught, ModuleNotFoundError) or caught.name.partition('.')[0] not in ('triton', 'onnx'):
            print(json.dumps([name, traceback.format_exc()]))
            return
    print(json.dumps([name, '']))


def fork(task, *arguments):
    sys.stdout.flush()
    if os.fork() == 0:
        task(*arguments)
        sys.stdout.flush()
        os._exit(0)
    os.wait()


def visit(package):
    if package == root:
        sys.modules[root] = importlib.util.module_from_spec(importlib.util.find_spec(root))
    else:
        attempt(package)
    for name in modules:
        if name.rpartition('.')[0] == package:
            fork(visit, name)


fork(visit, root)
for name in modules:
    attempt(name)
"""


def find_modules() -> list:
    """Names of all modules of the package."""
    names = []
    for folder, package in (('mmvmamba', 'mmvmamba'), ('ops', 'mmvmamba.ops')):
        for path in sorted((ROOT / folder).rglob('*.py')):
            parts = path.relative_to(ROOT / folder).with_suffix('').parts
            if '.mim' not in parts:
                names.append('.'.join((package, *(part for part in parts if part != '__init__'))))
    return names


def test_every_module_can_be_the_first_import():
    names = find_modules()
    command = [sys.executable, '-W', 'ignore', '-c', FIRST_IMPORTS, json.dumps(names)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('["mmvmamba')]
    assert len(names) > 50 and sorted(name for name, _ in seen) == sorted(2 * names)[1:], result.stderr
    failed = [f'{name}:\n{error}' for name, error in seen if error]
    assert not failed, '\n'.join(failed)


def test_floors():
    """The contracts are in pyproject.toml."""
    pytest.importorskip('importlinter')
    lint = 'from importlinter.cli import lint_imports_command; lint_imports_command()'
    result = subprocess.run([sys.executable, '-c', lint, '--no-cache'], cwd=ROOT, capture_output=True, text=True)
    assert '2 kept, 0 broken' in result.stdout and result.returncode == 0, result.stdout + result.stderr
