"""The figures of README and docs are what benchmarks/results and the metafiles say."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.test_tools.conftest import load_tool

ROOT = Path(__file__).resolve().parents[1]
REPORTS = [p for p in sorted((ROOT / 'benchmarks/results').rglob('*.json')) if p.stem not in ('published', 'matrix')]


@pytest.fixture(scope='module')
def figures():
    return load_tool('benchmark/figures.py')


def test_pages_and_plots_are_what_the_files_give(figures):
    assert [str(path.relative_to(ROOT)) for path in figures.outdated()] == [], 'run make figures'


def test_every_table_stands_somewhere(figures):
    text = ''.join(path.read_text() for path in (ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')))
    assert set(re.findall(r'<!-- figures: ([\w-]+) -->', text)) == set(figures.TABLES)


@pytest.mark.parametrize('path', REPORTS, ids=lambda path: path.stem)
def test_a_report_says_where_and_how(path):
    report = json.loads(path.read_text())
    assert all(report[key] for key in ('machine', 'versions', 'commit', 'commands', 'rows'))
    assert 'dirty' not in report['commit'] and all('python tools/' in line for line in report['commands'])


def test_a_changed_figure_is_named(figures, tmp_path, monkeypatch, capsys):
    for name in ('benchmarks', 'configs', 'docs', 'requirements'):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / 'README.md', tmp_path)
    monkeypatch.setattr(figures, 'ROOT', tmp_path)
    monkeypatch.setattr(
        figures, 'read', lambda name, root=tmp_path: json.loads((tmp_path / 'benchmarks/results' / name).read_text())
    )
    assert figures.main(['--check']) == 0
    page = tmp_path / 'README.md'
    page.write_text(page.read_text().replace('82.6', '85.6'))
    assert figures.main(['--check']) == 1 and 'out of date: README.md' in capsys.readouterr().out
    assert figures.main([]) == 0 and page.read_text() == (ROOT / 'README.md').read_text()


def test_rows_that_are_missing_leave_dashes(figures):
    rows = [
        dict(
            model='tiny-s1l8',
            setting='224',
            precision='fp16',
            mode='infer',
            execution='eager',
            images_per_second=1234.0,
        )
    ]
    report = dict(machine='a GPU', versions=dict(torch='2'), commit='abc', rows=rows)
    text = figures.models(report)
    assert '| VMamba-T s1l8 | 224 | eager | 1,234 |' in text and 'training, images/s' not in text


def test_the_matrix_fills_the_table_of_versions(figures, tmp_path):
    (tmp_path / 'benchmarks/results').mkdir(parents=True)
    (tmp_path / 'requirements').mkdir()
    (tmp_path / 'requirements/tested.txt').write_text('numpy==2.4.6\n')
    matrix = tmp_path / 'benchmarks/results/matrix.json'
    rows = [dict(torch='2.4.1', mmcv='2.1.0', remarks=''), dict(Python='3.14', torch='2.15.0', remarks='not here')]
    matrix.write_text(json.dumps(dict(machine='a box', rows=rows)))
    assert figures.versions(tmp_path).splitlines()[2:] == [
        '| 2.4.1 | 2.1.0 | – |',
        '| 2.15.0 | – | 3.14 |',
        '',
        '- Python 3.14, torch 2.15.0: not here',
        '',
        'a box. `make setup` installs, and all tests run with: Python 3.11, numpy 2.4.6.',
    ]


def test_the_published_figures_of_swin_are_the_metafiles(figures):
    rows = {row['model']: row for row in figures.read('published.json')['rows']}
    for package, file, metric, names in (
        ('mmpretrain', 'metafile.yml', 'Top 1 Accuracy', 'swin-{}_3rdparty_in1k'),
        ('mmseg', 'metafile.yaml', 'mIoU', 'swin-{}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512'),
    ):
        folder = Path(importlib.util.find_spec(package).origin).parent / '.mim/configs'
        path = next(folder.glob(f'swin*/{file}'))
        models = {model['Name']: model for model in yaml.safe_load(path.read_text())['Models']}
        for size, short in figures.SIZES.items():
            results = models[names.format(size)]['Results']
            results = results[0] if isinstance(results, list) else results
            key = dict(mIoU='miou').get(metric, 'top1')
            assert results['Metrics'][metric] == rows[f'Swin-{short}'][key]
