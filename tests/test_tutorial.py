"""docs/tutorial.ipynb: its cells run one after the other, on small data and on checkpoints of initial weights."""

import json
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch

from mmvmamba.cli import load_model
from tests.test_tools.conftest import load_tool

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = dict(classification='vmamba-nano_1xb64_digits-32px', detection='mask-rcnn_*', segmentation='*upernet*')


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A folder with what `make demo` makes, untrained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    assert load_tool('dataset_converters/digits.py').main(['--num-train', '4', '--num-val', '2']) == 0
    for task, name in CONFIGS.items():
        (tmp_path / 'demo_output/work_dirs' / task).mkdir(parents=True)
        model = load_model(str(next((ROOT / 'configs/demo').glob(f'{name}.py'))), None)
        meta = dict(dataset_meta=dict(classes=tuple('0123456789'), palette=[[0, 0, 0]] * 10))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), f'demo_output/work_dirs/{task}/epoch_1.pth')


def test_every_cell_runs(demo, capsys, monkeypatch):
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, 'show', lambda: shown.append(plt.gcf()) or plt.close())
    cells = json.loads((ROOT / 'docs/tutorial.ipynb').read_text())['cells']
    code = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    namespace = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i, source in enumerate(code):
            exec(compile(source, f'cell {i}', 'exec'), namespace)
    assert len(shown) == 4 and all(figure.axes for figure in shown)
    assert capsys.readouterr().out.endswith('agree\n') and namespace['labels'].dim() == 2
