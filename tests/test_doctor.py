"""The doctor: the report of this installation, and every trap with its remedy."""

import importlib.machinery
import re
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest
import torch

from mmvmamba import doctor, mmcv_ops

GOOD = {'torch': '2.11.0+cu130', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0', 'setuptools': '80.10.2'}
COMPILED = mmcv_ops.State('compiled', '_ext.so')
TRAPS = {
    'transformers': (
        dict(mmpretrain='1.2.0', transformers='5.17.0'),
        {},
        'beside transformers 5.17.0',
        'transformers<5',
    ),
    'pkg_resources': (dict(setuptools='82.0.0'), dict(has_pkg_resources=False), 'pkg_resources', 'setuptools<82'),
    'mmcv_without_ops': ({}, dict(ops=mmcv_ops.State('none', 'no _ext')), 'has no ops (no _ext)', 'MMCV_WITH_OPS=1'),
    'broken_ops': ({}, dict(ops=mmcv_ops.State('broken', 'OSError: x')), 'do not load: OSError: x', 'mmcv-lite'),
    'stand_in_not_placed': ({}, dict(ops=mmcv_ops.State('stand-in', '')), 'mim test mmdet', 'mmcv_ops place'),
    'two_mmcv': ({}, dict(mmcv_distributions=('mmcv', 'mmcv-lite')), 'mmcv and mmcv-lite', '-y mmcv mmcv-lite'),
    'other_torchvision': (
        dict(torchvision='0.25.0'),
        {},
        '0.25.0 does not belong to torch 2.11',
        'torchvision==0.26.*',
    ),
    'old_torchvision': (dict(torch='2.15.0', torchvision='0.28.0'), {}, 'to torch 2.15.0', 'torchvision==0.29.*'),
    'new_mmcv': (dict(mmcv='2.2.0'), {}, r'mmcv 2.2.0 is newer than mmdet', 'mmcv-lite==2.1.0'),
    'no_mmcv': (dict(mmcv=None), {}, 'mmcv is not installed, which mmdet need', 'mmcv-lite==2.1.0'),
    'new_python': (dict(python='3.14.0'), {}, 'pkgutil.find_loader', 'Python 3.10 to 3.13'),
    'imgaug': (dict(imgaug='0.4.0', numpy='2.4.6'), {}, 'imgaug 0.4.0 breaks at import', 'imaug'),
    'cuda_torchvision': (dict(torch='2.11.0+cpu', torchvision='0.26.0'), {}, 'is a CUDA build', 'same index'),
    'safe_loading': ({}, dict(loads_checkpoints=False), 'torch 2.11.0+cu130 refuses checkpoints', 'import mmvmamba'),
    'no_mim_files': ({}, dict(has_mim_files=False), 'no .mim folder', 'pip install'),
}


def find(versions, **flags):
    versions = {name: version for name, version in {**GOOD, **versions}.items() if version}
    return doctor.find_traps(
        versions,
        **{
            **dict(has_pkg_resources=True, ops=COMPILED, has_mim_files=True, loads_checkpoints=True),
            **flags,
        },
    )


def test_a_good_set_has_no_traps():
    assert find({}) == []
    assert find(dict(transformers='4.57.0', mmpretrain='1.2.0', torchvision='0.26.0')) == []
    for version in ('0.29.2', '0.30.0'):
        assert find(dict(torch='2.15.0', torchvision=version)) == []
    assert find({}, ops=mmcv_ops.State('stand-in', 'placed', placed=True), mmcv_distributions=('mmcv-lite',)) == []


@pytest.mark.parametrize('name', TRAPS)
def test_each_trap_is_found_with_its_remedy(name):
    versions, flags, what, remedy = TRAPS[name]
    (trap,) = find(versions, **flags)
    assert what in trap.what and remedy in trap.remedy


def test_versions_and_releases():
    versions = doctor.installed_versions()
    assert {'torch', 'mmengine', 'numpy'} <= versions.keys()
    assert doctor.release('2.11.0+cu130') == (2, 11) and doctor.release('5.0rc1') == (5, 0)


FORKS = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.3.3',
    'onedl-mmpretrain': '1.3.6',
}


def only(distributions, monkeypatch):
    """Let these distributions alone be installed."""

    def version(name):
        if name not in distributions:
            raise metadata.PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(doctor.metadata, 'version', version)


def test_the_forks_are_recognised_and_need_no_older_mmcv_or_setuptools(monkeypatch):
    monkeypatch.setattr(doctor, '_module_version', lambda module: None)  # nor is anything there without metadata
    only({**FORKS, 'torch': '2.11.0', 'setuptools': '82.0.0'}, monkeypatch)
    versions = doctor.installed_versions()
    assert versions['mmcv'] == '2.3.6 (onedl-mmcv)' and versions['mmdet'] == '3.5.1 (onedl-mmdetection)'
    assert {'mmengine', 'mmsegmentation', 'mmpretrain'} <= versions.keys()
    assert doctor.find_traps(versions, False, COMPILED, True, True) == []
    only({**FORKS, 'mmdet': '3.3.0'}, monkeypatch)
    (trap,) = doctor.find_traps(doctor.installed_versions(), True, COMPILED, True, True)
    assert 'is newer than mmdet accept' in trap.what


def test_a_package_without_metadata_says_its_version_itself(monkeypatch):
    import mmcv

    only({'mmcv-lite': '2.0.1'}, monkeypatch)
    assert doctor.installed_versions()['mmcv'] == '2.0.1 (mmcv-lite)'
    only({}, monkeypatch)
    assert doctor.installed_versions()['mmcv'] == mmcv.__version__


def test_a_folder_that_only_has_the_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / 'mmcv').mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    find_spec = util.find_spec
    spec = importlib.machinery.PathFinder.find_spec('mmcv', [str(tmp_path)])
    assert spec.origin is None
    monkeypatch.setattr(doctor.util, 'find_spec', lambda name: spec if name == 'mmcv' else find_spec(name))
    only({'torch': '2.11.0'}, monkeypatch)
    assert 'mmcv' not in doctor.installed_versions()
    assert all('mmcv is not installed' in trap.what for trap in doctor.detect_traps() if 'mmcv' in trap.what)


def test_a_module_that_breaks_at_import_is_left_out(tmp_path, monkeypatch):
    (tmp_path / 'broken_package').mkdir()
    (tmp_path / 'broken_package/__init__.py').write_text("raise OSError('no such library')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, 'PACKAGES', {'broken': (('broken',), 'broken_package')})
    assert doctor.installed_versions() == {}


def test_safe_loading_is_mended_at_import_and_the_doctor_sees_it(monkeypatch):
    assert doctor.allows_history_buffer()
    monkeypatch.setattr(torch.serialization, 'get_safe_globals', lambda: [(len, 'builtins.len'), dict])
    assert not doctor.allows_history_buffer()
    monkeypatch.setattr(torch, '__version__', '2.11.0')
    assert any('HistoryBuffer' in trap.what for trap in doctor.detect_traps())
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    assert not any('HistoryBuffer' in trap.what for trap in doctor.detect_traps())


@pytest.mark.parametrize(
    'missing, says', [('ops', 'hides the installed mmvmamba'), ('other', "No module named 'mmvmamba.other'")]
)
def test_a_source_tree_that_hides_the_installed_package_says_so(missing, says, tmp_path):
    (tmp_path / 'mmvmamba').mkdir()
    shutil.copy(Path(doctor.__file__).with_name('__init__.py'), tmp_path / 'mmvmamba')
    (tmp_path / 'mmvmamba/export.py').write_text(f'from .{missing}.backend import resolve\n')
    command = [sys.executable, '-S', '-c', 'import mmvmamba']  # without site-packages
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0 and says in result.stderr.splitlines()[-1]
    assert ('pip install --no-build-isolation -e .' in result.stderr) is (missing == 'ops')


def test_a_broken_backend_is_reported(monkeypatch, capsys):
    def broken(backend, device):
        raise OSError('no kernel image')

    monkeypatch.setattr(doctor, 'time_scan', broken)
    doctor.report_backends()
    assert 'FAILED: OSError: no kernel image' in capsys.readouterr().out


def test_report_of_this_installation():
    result = subprocess.run([sys.executable, '-m', 'mmvmamba.doctor'], capture_output=True, text=True)
    assert result.returncode == (1 if doctor.detect_traps() else 0), result.stderr
    for name in ('naive', 'cpu', 'triton', 'cuda'):
        assert f'  {name:8}' in result.stdout
    assert 'naive   yes' in result.stdout and ' ms, error ' in result.stdout and 'FAILED' not in result.stdout
    assert re.search('selective_scan_cuda_oflex +(missing|installed)', result.stdout), result.stdout
    assert 'known traps' in result.stdout and f'mmcv ops: {mmcv_ops.state().kind} (' in result.stdout
    assert ('mended at import' in result.stdout) is (doctor.release(torch.__version__) >= doctor.SAFE_LOADING)
