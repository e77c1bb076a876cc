"""tools/benchmark/deploy.py: one small run on CPU, a form that cannot run, and the table of its file."""

import json
from pathlib import Path

import pytest

from mmvmamba.export import openvino_library
from tests.test_tools.conftest import load_tool


@pytest.fixture
def tool(monkeypatch):
    pytest.importorskip('timm')
    pytest.importorskip('onnxruntime')
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'tools/benchmark')
    return load_tool('benchmark/deploy.py')


def test_measures_and_names_what_cannot_run(tool, tmp_path, capsys):
    models = ['vmamba_nano', 'test_vit']  # timm's own smallest stands for any other model
    arguments = ['--models', *models, '--forms', 'eager', 'onnx', 'onnx-int8', 'no-such-form']
    file = tmp_path / 'deploy.json'
    arguments += ['--batch-sizes', '2', '--sizes', '160', '--repeats', '2', '--out', str(file)]
    assert tool.main(arguments) == 0
    said = capsys.readouterr().out
    assert "vmamba_nano no-such-form: left out, ValueError: form is 'no-such-form'" in said
    report = json.loads(file.read_text())
    rows = {(row['model'], row['form']): row for row in report['rows']}
    assert set(rows) == {(model, form) for model in models for form in ('eager', 'onnx', 'onnx-int8')}
    assert rows['vmamba_nano', 'eager']['ratio'] == 1 and rows['vmamba_nano', 'eager']['error'] == 0
    for model in models:
        exact, rough = rows[model, 'onnx'], rows[model, 'onnx-int8']
        assert 0 < exact['error'] < 1e-4 < rough['error'] < 0.5
        assert exact['file_mib'] > rough['file_mib'] > 0 and exact['load_s'] > 0
    assert all(row['cpu_ms'] > 0 and row['wall_ms'] > 0 for row in rows.values())


def test_openvino(tool, tmp_path, capsys):
    pytest.importorskip('openvino', reason='OpenVINO is not installed')
    models, forms = ['vmamba_nano', 'test_vit'], ['openvino', 'openvino-loop-free-static', 'openvino-custom-op']
    file = tmp_path / 'deploy.json'
    arguments = ['--models', *models, '--forms', 'eager', *forms, '--batch-sizes', '2', '--sizes', '160']
    assert tool.main([*arguments, '--repeats', '2', '--out', str(file)]) == 0
    rows = {(row['model'], row['form']): row for row in json.loads(file.read_text())['rows']}
    try:
        openvino_library()
    except FileNotFoundError:
        assert 'vmamba_nano openvino-custom-op: left out, FileNotFoundError: mmvmamba' in capsys.readouterr().out
        forms.remove('openvino-custom-op')
    kinds = {('test_vit', 'openvino'), *(('vmamba_nano', form) for form in forms)}
    assert set(rows) == {*kinds, *((model, 'eager') for model in models)}
    assert all(0 < rows[kind]['error'] < 1e-4 and rows[kind]['load_s'] > 0 for kind in kinds)


def test_without_openvino_its_forms_are_left_out(tool, monkeypatch):
    found = []
    monkeypatch.setattr(tool, 'measure', lambda args, *_: found.append(args.forms) or [])
    for there in (None, 'a module'):
        monkeypatch.setattr(tool, 'find_spec', lambda name, there=there: there)
        assert tool.main([]) == 0
    without, whole = found[0], found[-1]
    assert [form for form in whole if form not in without] == [form for form in whole if form.startswith('openvino')]
    assert 'openvino-custom-op' in whole and 'onnx-custom-op' in without


def test_table_of_a_file():
    row = dict(model='vmamba_tiny_s1l8', batch=1, size=224, cpu_ms=120.04, ratio=1.0, error=0.0)
    package = dict(row, form='aoti', cpu_ms=96.0, ratio=0.8, error=3e-7, file_mib=118.4, load_s=0.21)
    swin = dict(row, form='eager', model='swin_tiny_patch4_window7_224', ratio=1.1, cpu_ms=132)
    rows = [
        dict(r, file_mib=r.get('file_mib'), load_s=r.get('load_s')) for r in (dict(row, form='eager'), package, swin)
    ]
    report = dict(rows=rows, machine='a machine', versions=dict(torch='2.14'), commit='abc')
    lines = load_tool('benchmark/figures.py').deploy(report).splitlines()
    assert lines[0] == '| model | form | 224 px, batch 1 | file, MiB | loading, s | largest error |'
    assert lines[2:5] == [
        '| VMamba-T | eager | 120.0 (1.00) | – | – | – |',
        '| VMamba-T | aoti | 96.0 (0.80) | 118.4 | 0.2 | 3e-07 |',
        '| Swin-T | eager | 132.0 (1.10) | – | – | – |',
    ]
