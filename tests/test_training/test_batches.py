"""Batches sent to a device: values, containers and data samples stay; small tensors travel together."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from mmvmamba.training import batches

Pair = namedtuple('Pair', 'a b')


class Boxes:
    def __init__(self, tensor):
        self.tensor = tensor


def make_batch():
    instances = InstanceData(labels=torch.arange(3), scores=torch.rand(3))
    boxes = Boxes(torch.rand(3, 4))
    semantic = PixelData(data=torch.zeros(1, 4, 5, dtype=torch.long))
    sample = BaseDataElement(metainfo=dict(img_shape=(4, 5)), gt=instances, sem=semantic)
    images = [torch.randint(0, 256, (3, 200, 200), dtype=torch.uint8) for _ in range(2)]
    return dict(
        inputs=images, data_samples=[sample], extra=Pair(torch.ones(2), 'text'), boxes=boxes, masks=np.ones((2, 2))
    )


def copied(monkeypatch):
    """Tensors that ``Tensor.to`` moves, as they are; the device is the CPU as another one."""
    moved = []

    def to(tensor, *args, **kwargs):
        moved.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, 'to', to)
    return moved


def test_small_tensors_travel_together(monkeypatch):
    batch = make_batch()
    labels, boxes = batch['data_samples'][0].gt.labels.clone(), batch['boxes'].tensor.clone()
    images = list(batch['inputs'])
    moved = copied(monkeypatch)
    other = torch.device('meta')  # any device that the tensors are not on
    sent = batches.send(batch, other)
    assert sent is batch and sent.keys() == make_batch().keys()
    large = [tensor for tensor in moved if tensor.dtype == torch.uint8]
    assert len(large) == 2 and len(moved) == 4, 'two images, all int64 together, all float32 together'
    assert all(torch.equal(one, two) and one is not two for one, two in zip(sent['inputs'], images))
    sample = sent['data_samples'][0]
    assert torch.equal(sample.gt.labels, labels) and sample.gt.labels is not labels
    assert sample.sem.data.shape == (1, 4, 5) and sample.img_shape == (4, 5)
    assert torch.equal(sent['boxes'].tensor, boxes)
    assert isinstance(sent['extra'], Pair) and sent['extra'].b == 'text' and sent['extra'].a.tolist() == [1, 1]
    assert isinstance(sent['masks'], np.ndarray)


def test_what_is_there_stays_as_it_is():
    batch = make_batch()
    image = batch['inputs'][0]
    assert batches.send(batch, torch.device('cpu'))['inputs'][0] is image


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU is visible to torch')
def test_on_a_gpu():
    batch, device = make_batch(), torch.device('cuda', 0)
    image = batch['inputs'][0].clone()
    sent = batches.send(batch, device, torch.cuda.Stream(device))
    found = list(batches._tensors(sent))
    assert len(found) == 7 and all(tensor.device == device for tensor in found)
    assert torch.equal(sent['inputs'][0].cpu(), image)
