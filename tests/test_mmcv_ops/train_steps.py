"""Training steps and one prediction on made-up images: ``python train_steps.py TASK [STEPS]`` prints what came out.

Run in a process of its own, with compiled mmcv or without, to compare bit by bit; ``make matrix`` runs one step.
"""

import copy
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import import_modules_from_strings

import mmvmamba  # noqa: F401  (registers the backbone)

DEMO = Path(__file__).resolve().parents[2] / 'configs/demo'
TASKS = {
    'classifier': ('mmpretrain', 'vmamba-nano_1xb64_digits-32px.py', 32),
    'mask_rcnn': ('mmdet', 'mask-rcnn_vmamba-nano_fpn_1xb8-1e_digits.py', 96),
    'upernet': ('mmseg', 'vmamba-nano_upernet_1xb4-4k_digits-128x128.py', 128),
}
STEPS, BATCH, OBJECTS = 20, 2, 5


def make_sample(task: str, size: int, random: np.random.RandomState):
    """One image of coloured rectangles, with what is to be learned of it."""
    image = random.randint(0, 60, (3, size, size)).astype(np.uint8)
    labels, boxes, masks = random.randint(0, 10, OBJECTS), [], np.zeros((OBJECTS, size, size), np.uint8)
    semantic = np.zeros((size, size), np.int64)
    for i, label in enumerate(labels):
        y, x = random.randint(0, size - 20, 2)
        height, width = random.randint(8, 20, 2)
        image[:, y : y + height, x : x + width] += np.uint8(60 + 10 * label)
        masks[i, y : y + height, x : x + width] = 1
        semantic[y : y + height, x : x + width] = label + 1
        boxes.append([x, y, x + width, y + height])
    if task == 'classifier':
        from mmpretrain.structures import DataSample

        return image, DataSample().set_gt_label(int(labels[0]))
    if task == 'upernet':
        from mmseg.structures import SegDataSample

        sample = SegDataSample(metainfo=dict(ori_shape=(size, size), img_shape=(size, size)))
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(semantic)[None])
        return image, sample
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    shape = dict(ori_shape=(size, size), img_shape=(size, size), scale_factor=(1.0, 1.0), img_id=0)
    sample = DetDataSample(metainfo=shape)
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.from_numpy(labels),
        masks=BitmapMasks(masks, size, size),
    )
    return image, sample


def digest(tensors) -> str:
    """One hash of all bits."""
    return hashlib.sha256(b''.join(value.detach().contiguous().numpy().tobytes() for value in tensors)).hexdigest()


def main(task: str, steps: int = STEPS) -> None:
    """Train, predict, print."""
    codebase, config, size = TASKS[task]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import_modules_from_strings(f'{codebase}.models')
    random, losses = np.random.RandomState(0), []
    with DefaultScope.overwrite_default_scope(codebase):
        model = MODELS.build(Config.fromfile(DEMO / config).model)
        model.init_weights()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        drawn = [make_sample(task, size, random) for _ in range(BATCH)]
        for _ in range(steps):
            images, samples = zip(*copy.deepcopy(drawn))  # the same batch each time: its loss has to fall
            data = model.data_preprocessor(
                dict(inputs=[torch.from_numpy(image) for image in images], data_samples=list(samples)), training=True
            )
            loss, values = model.parse_losses(model(**data, mode='loss'))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append({name: float(value).hex() for name, value in values.items()})
        model.eval()
        image, sample = make_sample(task, size, random)
        with torch.no_grad():
            found = model.test_step(dict(inputs=[torch.from_numpy(image)], data_samples=[sample]))[0]
    if task == 'mask_rcnn':
        found = [found.pred_instances[key] for key in ('bboxes', 'scores', 'labels', 'masks')]
    else:
        found = [found.pred_score if task == 'classifier' else found.seg_logits.data]
    extension = sys.modules.get('mmcv._ext')
    print(
        json.dumps(
            dict(
                stand_in=getattr(extension, '__stand_in__', False) if extension else None,
                losses=losses,
                weights=digest(model.state_dict().values()),
                found=len(found[0]),
                predictions=digest(found),
            )
        )
    )


if __name__ == '__main__':
    main(sys.argv[1], *map(int, sys.argv[2:]))
