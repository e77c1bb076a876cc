"""Who provides a name: what is installed wins, and nothing of somebody else's is touched."""

import importlib
import importlib.util
import inspect
import logging
import os
import subprocess
import sys

import pytest

from mmvmamba import compat
from mmvmamba.compat.__main__ import main
from mmvmamba.compat.finder import EXTENSIONS, FINDER, NAMES, PACKAGES, REPLACEMENT, source_of
from tests.test_tools.conftest import ROOT

pytestmark = pytest.mark.usefixtures('clean')


def write(folder, name, text='REAL = True\n'):
    """A module, or with a slash at its end a package, in a folder."""
    path = folder / (f'{name}__init__.py' if name.endswith('/') else f'{name}.py')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def kinds(rows):
    return {row.name: row.kind for row in rows}


def test_importing_mmvmamba_provides_none_of_the_names():
    code = (
        'import sys, mmvmamba, importlib.util as u; from mmvmamba.compat.finder import NAMES\n'
        'assert not any(type(f).__module__.startswith("mmvmamba.compat") for f in sys.meta_path)\n'
        'import mmvmamba.compat\n'
        'print([n for n in NAMES if getattr(u.find_spec(n), "loader", None).__class__.__name__ == "NameFinder"])'
    )
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert result.stdout.strip() == '[]', result.stderr


def test_install_provides_each_name_once_and_says_so(site, caplog, monkeypatch):
    caplog.set_level('INFO', logger='mmvmamba.compat')
    before = kinds(compat.table())
    monkeypatch.setattr(logging.getLogger('mmvmamba.compat'), 'propagate', True)
    rows = compat.install()
    assert [row.name for row in rows] == list(NAMES)
    assert all(row.kind == ('provided' if before[row.name] == 'missing' else before[row.name]) for row in rows)
    assert compat.install() == rows and sys.meta_path.count(FINDER) == 1 and sys.meta_path[-1] is FINDER
    assert compat.format_table(rows) in caplog.records[0].message and caplog.records[0].levelname == 'INFO'


@pytest.mark.parametrize('name', NAMES)
def test_modules_are_real(name):
    compat.install(replace=[name])
    module = importlib.import_module(name)
    assert module.__spec__.name == module.__name__ == name and module.__file__ == str(source_of(name))
    assert importlib.util.find_spec(name) is module.__spec__
    assert inspect.getsource(module) and module.__doc__ and sys.modules[name] is module
    assert hasattr(module, '__path__') == (name in PACKAGES)
    if name in EXTENSIONS and name != 'causal_conv1d_cuda':
        assert callable(module.fwd) and callable(module.bwd)
    assert kinds(compat.table())[name] == 'provided'


def test_every_provided_file_is_found():
    compat.install(replace=NAMES)
    folder = source_of('mamba_ssm').parents[1]
    names = [path.relative_to(folder).with_suffix('').parts for path in sorted(folder.rglob('*.py'))]
    modules = ['.'.join(part for part in name if part != '__init__') for name in names]
    assert len(modules) > 18
    for name in filter(None, modules):
        module = importlib.import_module(name)
        assert module.__spec__.loader is REPLACEMENT, name
        for public in getattr(module, '__all__', ()):
            assert hasattr(module, public), (name, public)
    for name in ('mamba_ssm.utils', 'mamba_ssm.ops.absent', 'selective_scan_cuda.absent', 'selective_scan_other'):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_what_is_installed_wins(site):
    write(site, 'selective_scan_cuda')
    write(site, 'mamba_ssm/')
    rows = compat.install()
    assert {n: k for n, k in kinds(rows).items() if k == 'installed'}.keys() >= {'selective_scan_cuda', 'mamba_ssm'}
    import mamba_ssm
    import selective_scan_cuda

    assert selective_scan_cuda.REAL and mamba_ssm.REAL
    reason = next(row.reason for row in compat.table() if row.name == 'selective_scan_cuda')
    assert str(site) in reason


def test_what_comes_to_the_path_later_wins(tmp_path, monkeypatch):
    compat.install()
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, 'selective_scan_cuda_core')
    importlib.invalidate_caches()
    import selective_scan_cuda_core

    assert selective_scan_cuda_core.REAL


def test_a_finder_that_comes_later_wins(tmp_path, monkeypatch):
    path = write(tmp_path, 'selective_scan_cuda_nrow')

    class Later:
        @staticmethod
        def find_spec(name, path_=None, target=None):
            if name == 'selective_scan_cuda_nrow':
                return importlib.util.spec_from_file_location(name, path)
            return None

    compat.install()
    monkeypatch.setattr(sys, 'meta_path', [*sys.meta_path, Later])
    import selective_scan_cuda_nrow

    assert selective_scan_cuda_nrow.REAL


def test_nothing_is_added_to_the_package_of_somebody_else(site):
    write(site, 'mamba_ssm/')
    compat.install()
    import mamba_ssm

    for name in ('mamba_ssm.ops', 'mamba_ssm.ops.selective_scan_interface'):
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'mamba_ssm\.ops'"):
            importlib.import_module(name)
    assert not hasattr(mamba_ssm, 'Mamba') and not hasattr(mamba_ssm, 'ops')


def test_what_is_imported_stays(site):
    write(site, 'causal_conv1d_cuda')
    import causal_conv1d_cuda

    compat.install()
    assert sys.modules['causal_conv1d_cuda'] is causal_conv1d_cuda and causal_conv1d_cuda.REAL
    with pytest.raises(ImportError, match=r'causal_conv1d_cuda was imported before, from .*; install before'):
        compat.install(replace=['causal_conv1d_cuda'])


def test_what_does_not_load_is_broken_until_it_is_replaced(site, caplog, monkeypatch):
    write(site, 'selective_scan_cuda', 'raise ImportError("libc10.so: undefined symbol")\n')
    write(site, 'selective_scan_cuda_core')
    monkeypatch.setattr(logging.getLogger('mmvmamba.compat'), 'propagate', True)
    row = compat.install()[0]
    assert row.kind == 'broken' and 'undefined symbol' in row.reason and "replace=['selective_scan_cuda']" in row.reason
    assert any(record.levelname == 'WARNING' and 'undefined symbol' in record.message for record in caplog.records)
    with pytest.raises(ImportError, match='undefined symbol'):
        import selective_scan_cuda
    rows = kinds(compat.install(replace=['selective_scan_cuda']))
    assert rows['selective_scan_cuda'] == 'provided' and rows['selective_scan_cuda_core'] == 'installed'
    import selective_scan_cuda

    assert selective_scan_cuda.__stand_in__


def test_a_package_is_replaced_with_all_below_it(site):
    write(site, 'mamba_ssm/')
    write(site, 'mamba_ssm/ops/')
    compat.install(replace=['mamba_ssm'])
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    assert selective_scan_fn.__module__ == 'mmvmamba.compat.interface'


def test_a_folder_without_code_is_said(site):
    (site / 'selective_scan').mkdir()
    row = next(row for row in compat.install() if row.name == 'selective_scan')
    assert row.kind == 'broken' and 'a folder without code' in row.reason


def test_a_blocked_import_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'selective_scan_cuda', None)
    assert compat.table()[0].kind == 'broken' and 'blocked' in compat.table()[0].reason


def test_wrong_names_to_replace():
    with pytest.raises(ValueError, match=r"replace has 'mamba', expected some of selective_scan_cuda, "):
        compat.install(replace=['mamba'])
    with pytest.raises(ValueError, match=r"replace is 'mamba_ssm', expected a list of names: \['mamba_ssm'\]"):
        compat.install(replace='mamba_ssm')


SCRIPT = """
import multiprocessing, pickle, sys
import helper
import selective_scan_cuda_core as scan

class Model:
    pass

def work(queue):
    queue.put((scan.__stand_in__, Model()))

if __name__ == '__main__':
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    provided, model = queue.get(timeout=100)
    print(sys.argv == [__file__, '--lr', '1', '-m', 'x', '--help'], provided, type(model) is Model)
    process.join()
    sys.exit(3)
"""


def test_an_untouched_script_runs_and_what_it_spawns_too(tmp_path):
    script = write(tmp_path, 'train', SCRIPT)
    write(tmp_path, 'helper')
    command = [sys.executable, '-W', 'ignore', '-m', 'mmvmamba.compat', str(script), '--lr', '1', '-m', 'x', '--help']
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == 'True True True' and result.returncode == 3, result.stderr


WHERE = """
import os, sys
os.chdir('/')
print(os.path.isabs(__file__), os.path.isfile(__file__), sys.path[0] == os.path.dirname(__file__), sys.argv)
import helper
print(b'helper' in __loader__.get_data(__file__), helper.REAL)
"""


def test_a_script_knows_where_it_is(tmp_path):
    """By a relative path, through a link, and after a change of the folder, as ``python`` has it."""
    write(tmp_path, 'real/train', WHERE)
    write(tmp_path, 'real/helper')
    (tmp_path / 'link.py').symlink_to('real/train.py')
    results = []
    for arguments in ([], ['-m', 'mmvmamba.compat']):
        command = [sys.executable, '-W', 'ignore', *arguments, 'link.py', '--x']
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        results.append(result.stdout.splitlines()[-2:])
    assert results[0] == results[1] == ["True True False ['link.py', '--x']", 'True True']


MODULE = """
import multiprocessing, subprocess, sys, warnings
warnings.simplefilter('error')
from . import helper
import selective_scan_cuda_core as scan

class Model:
    pass

def work(queue):
    queue.put((scan.__stand_in__, Model(), __package__))

if __name__ == '__main__':
    print(__name__, sys.argv == [__file__, *sys.argv[1:]], sys.argv[1:], helper.REAL, flush=True)
    if sys.argv[-1] != 'again':
        context = multiprocessing.get_context('spawn')
        queue = context.Queue()
        process = context.Process(target=work, args=(queue,))
        process.start()
        provided, model, package = queue.get(timeout=100)
        print(__name__, provided, type(model) is Model, package, flush=True)
        process.join()
        # as launchers do that start the same program once a GPU
        subprocess.run([sys.executable, '-W', 'ignore', '-m', __spec__.name, *sys.argv[1:], 'again'], check=True)
"""


def test_an_untouched_module_runs_and_what_it_starts_too(tmp_path):
    write(tmp_path, 'package/helper')
    write(tmp_path, 'package/__main__', MODULE)
    command = [sys.executable, '-W', 'ignore', '-m', 'mmvmamba.compat', '-m', 'package', '--lr', '-m']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith('__main__')] == [
        "__main__ True ['--lr', '-m'] True",
        '__main__ True True package',
        "__main__ True ['--lr', '-m', 'again'] True",
    ]


def test_the_command_without_a_script_prints_the_table(site, capsys):
    assert main(['--replace', 'mamba_ssm,selective_scan_cuda']) == 0
    assert 'in place of what is installed' in capsys.readouterr().out
    write(site, 'selective_scan_cuda_core', '1 / 0')
    assert main([]) == 1 and 'ZeroDivisionError' in capsys.readouterr().out
    assert main(['--replace', 'mamba']) == 1 and "replace has 'mamba'" in capsys.readouterr().err
    assert main(['-m', 'tests.absent']) == 1 and 'there is no module tests.absent' in capsys.readouterr().err
    assert main(['absent.py']) == 1 and 'there is no script absent.py' in capsys.readouterr().err
