"""Masks padded by the workers: what mmdet's preprocessor makes of them is the same."""

import copy
import pickle

import numpy as np
import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.dataset import pseudo_collate
from mmengine.registry import FUNCTIONS
from mmengine.structures import InstanceData
from torch.utils.data import DataLoader

from mmvmamba.training.padded_masks import pad_masks_collate

SIZES = ((30, 45), (41, 33))


def make_sample(size, objects=3, polygons=False):
    height, width = size
    chance = np.random.default_rng(height + objects)
    if polygons:
        masks = PolygonMasks([[np.array([1.0, 1, 5, 1, 5, 5])]] * objects, height, width)
    else:
        masks = BitmapMasks(chance.integers(0, 2, (objects, height, width), np.uint8), height, width)
    boxes = torch.tensor([[2.0, 3, 20, 25]]).repeat(objects, 1)
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size))
    sample.gt_instances = InstanceData(masks=masks, bboxes=boxes, labels=torch.zeros(objects).long())
    image = torch.from_numpy(chance.integers(0, 256, (3, height, width), np.uint8))
    return dict(inputs=image, data_samples=sample)


def masks_of(batch):
    return [sample.gt_instances.masks for sample in batch['data_samples']]


@pytest.mark.parametrize('value', [0, 7])
@pytest.mark.parametrize('divisor, asked', [(1, 1), (32, 32), (1, 32), (128, 32)])
def test_the_preprocessor_makes_the_same_of_them(divisor, asked, value):
    samples = [make_sample(size, objects) for size, objects in zip(SIZES, (3, 0))]
    preprocess = DetDataPreprocessor(pad_mask=True, mask_pad_value=value, pad_size_divisor=asked)
    expected = preprocess(pseudo_collate(copy.deepcopy(samples)), True)
    batch = pad_masks_collate(samples, pad_size_divisor=divisor)
    padded = masks_of(batch)
    assert all(type(masks).__name__ == 'PaddedMasks' for masks in padded)
    found = preprocess(batch, True)
    assert torch.equal(found['inputs'], expected['inputs'])
    for ours, theirs, before in zip(masks_of(found), masks_of(expected), padded):
        assert (ours.height, ours.width) == (theirs.height, theirs.width)
        assert ours.masks.dtype == theirs.masks.dtype and np.array_equal(ours.masks, theirs.masks)
        assert (ours is before) == (divisor == asked and value == 0)
    targets = [
        masks.crop_and_resize(torch.tensor([[2.0, 3, 20, 25]]), (8, 8), torch.tensor([1]), 'cpu').masks
        for masks in (masks_of(found)[0], masks_of(expected)[0])
    ]
    assert np.array_equal(*targets)


def test_they_pass_from_a_worker_and_through_pickles():
    samples = [make_sample(size) for size in SIZES]
    expected = masks_of(pad_masks_collate(copy.deepcopy(samples)))
    loader = DataLoader(samples, batch_size=2, num_workers=1, collate_fn=pad_masks_collate)
    for found in (masks_of(next(iter(loader))), pickle.loads(pickle.dumps(expected)), copy.deepcopy(expected)):
        for ours, theirs in zip(found, expected):
            assert type(ours) is type(theirs) and ours.inner == theirs.inner
            assert np.array_equal(ours.masks, theirs.masks)


def test_other_samples_stay_as_they_are():
    polygons, bare = make_sample(SIZES[0], polygons=True), make_sample(SIZES[1])
    del bare['data_samples'].gt_instances
    batch = FUNCTIONS.get('mmvmamba.pad_masks_collate')([polygons, bare])
    assert batch['data_samples'] == [polygons['data_samples'], bare['data_samples']]
    assert type(polygons['data_samples'].gt_instances.masks) is PolygonMasks
    with pytest.raises(ValueError, match='pad_size_divisor is 0, expected at least 1'):
        pad_masks_collate([polygons], pad_size_divisor=0)
