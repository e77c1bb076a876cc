"""docs/tutorial.ipynb: its cells run one after the other, on small data and on checkpoints of initial weights."""

import json
from pathlib import Path

import pytest
import torch

from mmvmamba.cli import load_model
from tests.run_tutorial import execute
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


def test_every_cell_runs(demo):
    notebook = json.loads((ROOT / 'docs/tutorial.ipynb').read_text())
    names = execute(notebook)
    outputs = [cell['outputs'] for cell in notebook['cells'] if cell['cell_type'] == 'code']
    kinds = [output['output_type'] for cell in outputs for output in cell]
    assert all(outputs) and kinds.count('display_data') == 4
    assert ''.join(outputs[-1][0]['text']).endswith('agree\n')
    assert names['labels'].dim() == 2 and len(names['kept']) <= len(names['result'])
