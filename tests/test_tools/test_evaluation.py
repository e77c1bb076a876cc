"""What a segmentor scores does not depend on how many images or processes evaluate it, at one scale or several."""

import pickle
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config

from tests.fill import fill_module
from tests.test_configs.zoo import build

from .conftest import ROOT
from .test_launch import DEMO
from .test_train_test import QUICK, metrics

CONFIG = ROOT / DEMO['mmseg']
# images at once and processes; of 4 images, batches of 3 leave a smaller one
WAYS = [(1, 1), (3, 1), (1, 2), (3, 2)]


def evaluate(run, folder, batch, processes, *arguments):
    """Metrics and predicted maps by the name of their image."""
    work = folder / f'evaluation{len(arguments)}-{batch}-{processes}'
    tool = f'bash {ROOT}/tools/dist_test.sh' if processes > 1 else f'python {ROOT}/tools/test.py'
    count = str(processes) if processes > 1 else ''
    command = f'{tool} {CONFIG} filled.pth {count} --work-dir {work} --out {work}.pkl'
    options = [*QUICK, f'test_dataloader.batch_size={batch}']
    run(command, *arguments, *options, PYTHON=sys.executable, PORT='29671')
    with open(f'{work}.pkl', 'rb') as file:
        samples = pickle.load(file)
    maps = {sample['img_path']: sample['pred_sem_seg']['data'].numpy() for sample in samples}
    assert len(maps) == len(samples) == 4
    scores = {name: value for name, value in metrics(work).items() if 'time' not in name}
    return scores, maps


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [[], ['--tta']], ids=['single-scale', 'multi-scale'])
def test_batch_and_processes_change_nothing(arguments, run, user_folder):
    model = fill_module(build(Config.fromfile(CONFIG)))
    torch.save(dict(state_dict=model.state_dict(), meta={}), user_folder / 'filled.pth')
    (scores, maps), *others = [evaluate(run, user_folder, *way, *arguments) for way in WAYS]
    assert {'mIoU', 'aAcc', 'mAcc'} <= scores.keys() and all(len(np.unique(labels)) > 2 for labels in maps.values())
    for other_scores, other_maps in others:
        assert other_scores == scores
        assert other_maps.keys() == maps.keys()
        for name, labels in maps.items():
            assert np.array_equal(other_maps[name], labels), name
