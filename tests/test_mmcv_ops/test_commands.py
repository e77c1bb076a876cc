"""Upstream's commands and functions with the stand-in in mmcv's folder, from a folder outside the repository."""

import os

import pytest

from mmvmamba.mmcv_ops.placing import TEXT
from tests.test_mmcv_ops.overlay import make_overlay
from tests.test_tools.conftest import ROOT, make_user_folder, runner_in
from tests.test_tools.test_launch import DEMO
from tests.test_tools.test_train_test import BY_EPOCH, BY_ITER, QUICK

pytestmark = pytest.mark.slow
DETECT = """
import sys, mmcv
from mmdet.apis import inference_detector, init_detector
assert mmcv._ext.__stand_in__
model = init_detector(*sys.argv[1:3], device='cpu')
print('found', len(inference_detector(model, sys.argv[3]).pred_instances))
"""
SEGMENT = """
import sys, mmcv.ops
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
assert mmcv._ext.__stand_in__
config = Config.fromfile(sys.argv[1])  # which names no test_pipeline, as mmseg's function wants it
config.test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
model = init_model(config, sys.argv[2], device='cpu')
print('found', inference_model(model, sys.argv[3]).pred_sem_seg.shape)
"""


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a small data set, and the function that runs commands there with the stand-in placed."""
    folder = make_user_folder(tmp_path_factory.mktemp('user'))
    overlay = make_overlay(tmp_path_factory.mktemp('site'))
    (overlay / '_ext.py').write_text(TEXT)
    return folder, runner_in(folder, {**os.environ, 'PYTHONPATH': str(overlay.parent)})


@pytest.mark.parametrize(
    'codebase, package, settings, checkpoint, metric, code',
    [
        ('mmdet', 'mmdet', BY_EPOCH, 'epoch_1.pth', 'coco/segm_mAP', DETECT),
        ('mmseg', 'mmsegmentation', BY_ITER, 'iter_2.pth', 'mIoU', SEGMENT),
    ],
)
def test_train_test_and_inference(codebase, package, settings, checkpoint, metric, code, place):
    folder, run = place
    config, work = ROOT / DEMO[codebase], folder / codebase
    run(f'python -m mim train {package} {config} --gpus 0 --work-dir {work}', *QUICK, *settings)
    test = f'python -m mim test {package} {config} --checkpoint {work / checkpoint} --gpus 0 --work-dir {work}/test'
    assert metric in run(test, *QUICK)
    image = next((folder / 'data/digits/scenes/val').iterdir())
    assert 'found' in run('python -c', code, str(config), str(work / checkpoint), str(image))
