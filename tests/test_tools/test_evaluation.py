"""What a segmentor scores does not depend on how many images or processes evaluate it, at one scale or several, nor
what a detector finds on how many processes do."""

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

# images at once and processes; of 4 images, batches of 3 leave a smaller one
WAYS = [(1, 1), (3, 1), (1, 2), (3, 2)]


def evaluate(run, folder, scope, batch, processes, *arguments):
    """Metrics, and predicted samples by the name of their image."""
    work = folder / f'{scope}{len(arguments)}-{batch}-{processes}'
    tool = f'bash {ROOT}/tools/dist_test.sh' if processes > 1 else f'python {ROOT}/tools/test.py'
    count = str(processes) if processes > 1 else ''
    command = f'{tool} {ROOT / DEMO[scope]} {scope}.pth {count} --work-dir {work} --out {work}.pkl'
    options = [*QUICK, f'test_dataloader.batch_size={batch}']
    run(command, *arguments, *options, PYTHON=sys.executable, PORT='29671')
    with open(f'{work}.pkl', 'rb') as file:
        samples = pickle.load(file)
    found = {sample['img_path']: sample for sample in samples}
    assert len(found) == len(samples) == 4
    scores = {name: value for name, value in metrics(work).items() if 'time' not in name}
    return scores, found


def save_filled(folder, scope):
    """Write a checkpoint of a demo config with weights that predict something."""
    model = fill_module(build(Config.fromfile(ROOT / DEMO[scope])))
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / f'{scope}.pth')


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [[], ['--tta']], ids=['single-scale', 'multi-scale'])
def test_segmentor(arguments, run, user_folder):
    save_filled(user_folder, 'mmseg')
    (scores, samples), *others = [evaluate(run, user_folder, 'mmseg', *way, *arguments) for way in WAYS]
    maps = {name: sample['pred_sem_seg']['data'].numpy() for name, sample in samples.items()}
    assert {'mIoU', 'aAcc', 'mAcc'} <= scores.keys() and all(len(np.unique(labels)) > 2 for labels in maps.values())
    for other_scores, other_samples in others:
        assert other_scores == scores and other_samples.keys() == maps.keys()
        for name, labels in maps.items():
            assert np.array_equal(other_samples[name]['pred_sem_seg']['data'].numpy(), labels), name


@pytest.mark.slow
def test_detector(run, user_folder):
    """Every number of its boxes, scores, labels and masks, image by image: a head takes the boxes of all images of a
    batch at once, and other batches are rounded differently."""
    save_filled(user_folder, 'mmdet')
    (scores, one), (other_scores, two) = (evaluate(run, user_folder, 'mmdet', 1, processes) for processes in (1, 2))
    assert other_scores == scores and {'coco/bbox_mAP', 'coco/segm_mAP'} <= scores.keys()
    assert two.keys() == one.keys()
    for name in one:
        first, second = one[name]['pred_instances'], two[name]['pred_instances']
        assert {'bboxes', 'scores', 'labels', 'masks'} == first.keys() == second.keys()
        assert len(first['scores'].unique()) > 5 and len(first['masks']) == len(first['scores'])
        assert all(torch.equal(first[key], second[key]) for key in first), name
