"""How ``mmcv.ops`` comes to the stand-in, and when it must not."""

import ast
import contextlib
import importlib.machinery
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mmvmamba import mmcv_ops
from mmvmamba.cli import UserError, models
from mmvmamba.mmcv_ops import __main__ as command
from mmvmamba.mmcv_ops import finder, placing
from mmvmamba.mmcv_ops.extension import FUNCTIONS
from mmvmamba.mmcv_ops.state import State
from tests.test_mmcv_ops.overlay import make_overlay, run, run_python

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
USE = """
import torch, mmcv, sys
from mmcv.ops import batched_nms, RoIAlign, get_compiler_version
boxes = torch.tensor([[0, 0, 4, 4.], [0, 0, 4, 5], [8, 8, 9, 9]])
dets, kept = batched_nms(boxes, torch.tensor([.5, .9, .1]), torch.zeros(3), dict(type='nms', iou_threshold=.5))
assert kept.tolist() == [1, 2]
assert RoIAlign(2)(torch.ones(1, 1, 8, 8), torch.tensor([[0, 1, 1, 6, 6.]])).eq(1).all()
assert mmcv.utils.ext_loader.check_ops_exist()
print(getattr(mmcv._ext, '__stand_in__', False), 'mmvmamba' in sys.modules, get_compiler_version())
"""


@pytest.fixture
def overlay(tmp_path):
    """An mmcv without compiled ops, in a folder of its own."""
    return make_overlay(tmp_path / 'site')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that counts as mmcv's in this process."""
    (tmp_path / '__init__.py').touch()
    spec = importlib.machinery.ModuleSpec('mmcv', None, origin=str(tmp_path / '__init__.py'))
    monkeypatch.setattr(placing.util, 'find_spec', lambda name: spec)
    return tmp_path


def fails(result, *words):
    assert result.returncode != 0
    assert all(word in result.stderr for word in words), result.stderr
    return True


@pytest.fixture
def bare(tmp_path):
    """A package named mmcv that holds nothing, in a folder of its own."""
    package = tmp_path / 'bare/mmcv'
    package.mkdir(parents=True)
    (package / '__init__.py').touch()
    return package


def test_an_import_of_mmvmamba_is_enough(overlay, tmp_path):
    result = run_python('import mmvmamba\n' + USE, overlay, cwd=tmp_path)
    assert result.stdout.startswith('True True none (mmvmamba, over torchvision '), result.stderr


def test_a_placed_file_needs_no_import_and_brings_nothing_else(overlay, tmp_path):
    (overlay / '_ext.py').write_text(placing.TEXT)
    result = run_python(USE, overlay, cwd=tmp_path)
    assert result.stdout.startswith('True False none (mmvmamba, over'), result.stderr
    report = run([sys.executable, '-m', 'mmvmamba.mmcv_ops', 'report'], overlay, cwd=tmp_path)
    assert report.returncode == 0 and f'mmcv ops: stand-in (placed in {overlay})' in report.stdout


def test_without_either_there_are_none(bare, tmp_path):
    assert fails(run_python('import mmcv._ext', bare, cwd=tmp_path), "No module named 'mmcv._ext'")
    (bare / '_ext.py').write_text(placing.TEXT)
    off = run_python('import mmcv._ext', bare, cwd=tmp_path, env={finder.SWITCH: 'off'})
    assert fails(off, "No module named 'mmcv._ext'", 'MMVMAMBA_MMCV_OPS=off disables', 'unset it', 'MMCV_WITH_OPS=1')
    alone = run([sys.executable, '-S', '-c', 'import mmcv._ext'], bare, cwd=tmp_path)  # without site-packages
    assert fails(alone, f'{bare}/_ext.py needs mmvmamba, which is not installed; delete it')


@pytest.mark.skipif(shutil.which('cc') is None, reason='there is no C compiler')
def test_compiled_ops_win(bare, tmp_path):
    (bare / '_ext.py').write_text(placing.TEXT)
    compiled, source = bare / f'_ext{SUFFIX}', tmp_path / '_ext.c'
    source.write_text(
        '#include <Python.h>\nstatic struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ext", NULL, -1};\n'
        'PyMODINIT_FUNC PyInit__ext(void) { return PyModule_Create(&module); }\n'
    )
    include = sysconfig.get_path('include')
    subprocess.run(['cc', '-shared', '-fPIC', f'-I{include}', str(source), '-o', str(compiled)], check=True)
    code = 'import torch, mmcv._ext, sys; from mmvmamba.mmcv_ops import install; install(); print(mmcv._ext.__file__)'
    result = run_python(code, bare, cwd=tmp_path)
    assert result.stdout.strip() == str(compiled), result.stderr


def test_compiled_ops_that_fail_to_load_stay_an_error(bare, tmp_path):
    (bare / '_ext.py').write_text(placing.TEXT)
    (bare / f'_ext{SUFFIX}').write_bytes(b'not a library')
    assert fails(run_python('import mmcv._ext', bare, cwd=tmp_path), 'ImportError', f'_ext{SUFFIX}')
    report = run([sys.executable, '-m', 'mmvmamba.mmcv_ops', 'report'], bare, cwd=tmp_path)
    assert report.returncode == 1 and 'mmcv ops: broken (ImportError' in report.stdout


def test_place_writes_once_and_remove_takes_it_away(folder):
    assert placing.place() == f'placed {folder / "_ext.py"}' and placing.is_placed(folder)
    assert placing.place().endswith('is in place')
    (folder / '_ext.py').write_text(placing.MARK + '\n# of an older version\n')
    assert placing.place().startswith('placed ')
    assert (folder / '_ext.py').read_text() == placing.TEXT
    assert placing.remove().startswith('removed ') and sorted(path.name for path in folder.iterdir()) == ['__init__.py']
    assert 'nothing removed' in placing.remove()


@pytest.mark.parametrize('theirs', ['_ext.py', '_ext/__init__.py'])
def test_what_is_not_ours_is_left_alone(theirs, folder, capsys):
    path = folder / theirs
    path.parent.mkdir(exist_ok=True)
    path.write_text('nms = None\n')
    with pytest.raises(FileExistsError, match='did not place'):
        placing.place()
    assert command.main(['place']) == 1 and 'did not place' in capsys.readouterr().err
    assert 'nothing removed' in placing.remove() and path.read_text() == 'nms = None\n'


def test_nothing_is_placed_beside_compiled_ops_or_when_switched_off(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv(finder.SWITCH, 'off')
        with pytest.raises(ImportError, match='MMVMAMBA_MMCV_OPS=off'):
            placing.place()
    (folder / f'_ext{SUFFIX}').touch()
    assert 'is compiled and wins: nothing placed' in placing.place()
    assert not (folder / '_ext.py').exists()
    (folder / f'_ext{SUFFIX}').unlink()
    (folder / '_ext.cpython-27-other.so').touch()  # of another Python: it cannot be loaded, so it wins nothing
    assert placing.place().startswith('placed ')


def test_without_mmcv(monkeypatch, capsys):
    monkeypatch.setattr(placing.util, 'find_spec', lambda name: None)
    assert mmcv_ops.state() == State('none', 'mmcv is not installed')
    assert command.main(['place']) == 1 and "pip install 'mmcv-lite==2.1.0'" in capsys.readouterr().err
    assert command.main(['report']) == 1


def test_the_switch_takes_two_words(monkeypatch):
    for value, off in (('', False), ('on', False), ('off', True)):
        monkeypatch.setenv(finder.SWITCH, value)
        assert finder.switched_off() is off
        with pytest.raises(ModuleNotFoundError, match='unset it, or compile') if off else contextlib.nullcontext():
            assert finder.FINDER.find_spec(finder.NAME).loader is finder.FINDER
    monkeypatch.setenv(finder.SWITCH, 'no')
    with pytest.raises(ImportError, match="MMVMAMBA_MMCV_OPS is 'no', expected on or off"):
        finder.switched_off()


def test_a_tool_says_that_a_codebase_does_not_import(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f'{name} found no mmcv._ext\nmore')

    monkeypatch.setattr(models, 'import_module', fail)
    with pytest.raises(UserError, match=r'mmdet cannot be imported: mmdet\.models found no mmcv\._ext; "python -m'):
        models.require_codebase('mmdet')


def test_the_finder_is_the_last_one_and_finds_one_name():
    import mmvmamba  # noqa: F401  (installs it)

    mmcv_ops.install()
    assert [entry for entry in sys.meta_path if isinstance(entry, finder.ExtensionFinder)] == [finder.FINDER]
    assert finder.FINDER.find_spec('mmcv') is finder.FINDER.find_spec('mmcv._extra') is None


def test_every_function_is_in_the_documentation():
    page = (Path(__file__).parents[2] / 'docs/mmcv_ops.md').read_text()
    assert [name for name in FUNCTIONS if f'`{name}`' not in page] == []


def test_it_imports_torch_torchvision_and_numpy_only():
    names = set()
    for path in Path(mmcv_ops.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name.split('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split('.')[0])
    assert names - {*sys.stdlib_module_names} == {'torch', 'torchvision', 'numpy'}
