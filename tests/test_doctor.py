"""The doctor: the report of this installation, and every trap with its remedy."""

import subprocess
import sys

import pytest

from mmvmamba import doctor

GOOD = {'torch': '2.11.0+cu130', 'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0', 'setuptools': '80.10.2'}
TRAPS = {
    'transformers': (
        dict(mmpretrain='1.2.0', transformers='5.17.0'),
        {},
        'beside transformers 5.17.0',
        'transformers<5',
    ),
    'pkg_resources': (dict(setuptools='82.0.0'), dict(has_pkg_resources=False), 'pkg_resources', 'setuptools<82'),
    'mmcv_without_ops': ({}, dict(has_mmcv_ops=False), 'no compiled ops', 'MMCV_WITH_OPS=1'),
    'new_mmcv': (dict(mmcv='2.2.0'), {}, r'mmcv 2.2.0 is newer than mmdet', 'mmcv==2.1.0'),
    'new_torch': (dict(torch='2.13.1', mmcv=None), {}, 'mmcv 2.1 can not be built', 'torch<2.13'),
    'cuda_torchvision': (dict(torch='2.11.0+cpu', torchvision='0.26.0'), {}, 'is a CUDA build', 'same index'),
    'no_mim_files': ({}, dict(has_mim_files=False), 'no .mim folder', 'pip install'),
}


def find(versions, **flags):
    versions = {name: version for name, version in {**GOOD, **versions}.items() if version}
    return doctor.find_traps(
        versions, **{**dict(has_pkg_resources=True, has_mmcv_ops=True, has_mim_files=True), **flags}
    )


def test_a_good_set_has_no_traps():
    assert find({}) == []
    assert find(dict(transformers='4.57.0', mmpretrain='1.2.0', torchvision='0.26.0')) == []


@pytest.mark.parametrize('name', TRAPS)
def test_each_trap_is_found_with_its_remedy(name):
    versions, flags, what, remedy = TRAPS[name]
    (trap,) = find(versions, **flags)
    assert what in trap.what and remedy in trap.remedy


def test_versions_and_releases():
    versions = doctor.installed_versions()
    assert {'torch', 'mmengine', 'numpy'} <= versions.keys()
    assert doctor.release('2.11.0+cu130') == (2, 11) and doctor.release('5.0rc1') == (5, 0)


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
    assert 'known traps' in result.stdout
