"""One import, or none, serves mmpretrain, mmdet and mmsegmentation; the import order of the package is one-way."""

import ast
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope

import mmvmamba
import mmvmamba.ops

SCOPES = ('mmpretrain', 'mmdet', 'mmseg')
ROOTS = dict(mmvmamba=Path(mmvmamba.__file__).parent, ops=Path(mmvmamba.ops.__file__).parent)


@pytest.mark.parametrize('name', ['mmvmamba.VSSMBackbone', 'VSSMBackbone'])
def test_same_backbone_in_all_scopes(name):
    x = torch.randn(1, 3, 32, 32)
    results = []
    for scope in SCOPES:
        registry = importlib.import_module(f'{scope}.registry').MODELS
        init_default_scope(scope)
        torch.manual_seed(0)
        model = registry.build(dict(type=name, arch='nano')).eval()
        results.append((model.state_dict(), model(x)))
    for state, outs in results[1:]:
        assert state.keys() == results[0][0].keys()
        assert all(torch.equal(state[key], results[0][0][key]) for key in state)
        assert all(torch.equal(first, second) for first, second in zip(outs, results[0][1]))


def test_scope_in_the_type_needs_no_import():
    for scope in SCOPES:
        code = (
            f'from {scope}.registry import MODELS\n'
            'from mmengine.registry import init_default_scope\n'
            f'init_default_scope("{scope}")\n'
            'print(type(MODELS.build(dict(type="mmvmamba.VSSMBackbone", arch="nano"))).__name__)\n'
        )
        command = [sys.executable, '-c', code]
        with tempfile.TemporaryDirectory() as elsewhere:
            result = subprocess.run(command, cwd=elsewhere, env=os.environ, capture_output=True, text=True)
        assert result.stdout.split()[-1:] == ['VSSMBackbone'], f'{scope}: {result.stderr}'


@pytest.mark.parametrize('package', ROOTS)
def test_no_codebase_is_imported(package):
    for path in ROOTS[package].rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or '']
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            assert not {name.split('.')[0] for name in names} & {'mmdet', 'mmseg', 'mmpretrain'}, path


def test_ops_import_only_torch_and_triton():
    allowed = set(sys.stdlib_module_names) | {'torch', 'triton'}
    for path in ROOTS['ops'].rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            assert {name.split('.')[0] for name in names} <= allowed, (path, names)


def test_layers_do_not_import_models():
    for path in (ROOTS['mmvmamba'] / 'layers').glob('*.py'):
        text = path.read_text()
        assert 'mmvmamba.models' not in text and 'mmengine' not in text, path
