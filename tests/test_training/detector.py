"""A detector in two processes, of which the second has scenes without objects and finds none: ``detector.py OUT``.

The working folder holds the digits data set. Saves to OUT.1 and OUT.2 what one process and two make of it: the
gradients of a training step, and the metrics of an evaluation.
"""

import sys

import mmdet  # noqa: F401
import numpy as np
import torch
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import DATASETS, MODELS, init_default_scope

from tests.test_tools.conftest import ROOT

from .distributed import fork

CONFIG = ROOT / 'configs/demo/mask-rcnn_vmamba-nano_fpn_1xb8-1e_digits.py'


def batch(dataset, rank: int) -> dict:
    """Two scenes of a process; the second process sees nothing in them."""
    items = [dataset[2 * rank], dataset[2 * rank + 1]]
    for item in items:
        sample = item['data_samples']
        assert len(sample.gt_instances)
        if rank == 1:
            sample.gt_instances = sample.gt_instances[torch.zeros(len(sample.gt_instances), dtype=torch.bool)]
    return pseudo_collate(items)


def gradients(model, data: dict, rank: int) -> dict:
    """Gradients of one training step, with the random numbers of a process."""
    torch.manual_seed(rank)
    np.random.seed(rank)
    inner = model.module if isinstance(model, MMDistributedDataParallel) else model
    model.zero_grad()
    loss, values = inner.parse_losses(model(**inner.data_preprocessor(data, True), mode='loss'))
    assert all(value.isfinite().all() for value in values.values())
    loss.backward()
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.requires_grad}


def evaluate(cfg, ranks) -> dict:
    """Metrics where the first process predicts the truth of the even scenes and the second nothing in the odd ones."""
    metric = CocoMetric(ann_file=cfg.val_evaluator.ann_file, metric=['bbox', 'segm'])
    val = dict(cfg.val_dataloader.dataset, test_mode=False, pipeline=cfg.train_dataloader.dataset.pipeline)
    dataset = DATASETS.build(val)
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        if index % 2 not in ranks:
            continue
        sample = dataset[index]['data_samples']
        found = sample.gt_instances if index % 2 == 0 else sample.gt_instances[:0]
        prediction = dict(
            bboxes=found.bboxes.tensor,
            labels=found.labels,
            scores=torch.full((len(found),), 0.9),
            masks=torch.from_numpy(found.masks.masks.astype(bool)),
        )
        metric.process({}, [dict(img_id=sample.img_id, ori_shape=sample.ori_shape, pred_instances=prediction)])
    return {name: float(value) for name, value in metric.evaluate(len(dataset)).items()}


def main(out: str) -> None:
    cfg = Config.fromfile(CONFIG)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model, dataset = MODELS.build(cfg.model), DATASETS.build(cfg.train_dataloader.dataset)
    torch.set_num_threads(1)

    def alone(rank):
        parts = [gradients(model, batch(dataset, i), i) for i in (0, 1)]
        mean = {name: (value + parts[1][name]) / 2 for name, value in parts[0].items()}
        return dict(gradients=mean, metrics=evaluate(cfg, (0, 1)))

    def together(rank):
        wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
        return dict(gradients=gradients(wrapped, batch(dataset, rank), rank), metrics=evaluate(cfg, (rank,)))

    fork(f'{out}.1', 1, alone)
    fork(f'{out}.2', 2, together)


if __name__ == '__main__':
    main(*sys.argv[1:])
