"""Training samples of random pixels in memory, as the pipelines of the three codebases pack them."""

import numpy as np
import torch
from mmengine.registry import DATASETS
from mmengine.structures import InstanceData, PixelData
from torch.utils.data import Dataset

IMAGES = 64  # that differ
OBJECTS = 7  # of an image, as COCO's have on average
CROPS = ('RandomResizedCrop', 'RandomCrop', 'RandomChoiceResize', 'Resize')


class Samples(Dataset):
    """As many samples as are asked for, of a few images in memory; a base class.

    Args:
        length (int): Number of samples.
        sizes (list[tuple[int, int]]): Heights and widths; each batch has the next of them.
        batch (int): Samples that follow each other with one size.
        classes (int): Number of classes.
    """

    metainfo: dict = {}

    def __init__(self, length: int, sizes: list, batch: int, classes: int):
        self.length, self.sizes, self.batch, self.classes = length, sizes, batch, classes
        chance = torch.Generator().manual_seed(0)
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        count = min(IMAGES, max(4, IMAGES * 224 * 224 // (height * width)))
        self.images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=chance)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        height, width = self.sizes[index // self.batch % len(self.sizes)]
        image = self.images[index % len(self.images), :, :height, :width].contiguous()
        return dict(inputs=image, data_samples=self.annotate(index, height, width))

    def annotate(self, index: int, height: int, width: int):
        """The data sample of an image."""
        raise NotImplementedError


@DATASETS.register_module(name='SyntheticClassified', force=True)
class Classified(Samples):
    """Images with a label."""

    def annotate(self, index: int, height: int, width: int):
        from mmpretrain.structures import DataSample

        sample = DataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
        return sample.set_gt_label(index % self.classes)


@DATASETS.register_module(name='SyntheticDetected', force=True)
class Detected(Samples):
    """Images with boxes, labels and masks of objects of all sizes."""

    def annotate(self, index: int, height: int, width: int):
        from mmdet.structures import DetDataSample
        from mmdet.structures.bbox import HorizontalBoxes
        from mmdet.structures.mask import BitmapMasks

        chance = np.random.default_rng(index % 997)
        count = int(chance.integers(1, 2 * OBJECTS))
        sides = np.exp(chance.uniform(np.log(0.04), np.log(0.8), (count, 2))) * (width, height)
        low = chance.uniform(0, 1, (count, 2)) * ((width, height) - sides)
        boxes = np.concatenate([low, low + np.maximum(sides, 4)], 1).clip(0, (width, height, width, height))
        masks = np.zeros((count, height, width), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int)):
            mask[y1 : y2 + 1, x1 : x2 + 1] = 1
        objects = InstanceData(
            bboxes=HorizontalBoxes(boxes.astype(np.float32)),
            labels=torch.from_numpy(chance.integers(0, self.classes, count)),
            masks=BitmapMasks(masks, height, width),
        )
        none = InstanceData(bboxes=HorizontalBoxes(torch.zeros(0, 4)), labels=torch.zeros(0, dtype=torch.long))
        meta = dict(img_id=index, img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=dict(meta, flip=False, flip_direction=None))
        sample.gt_instances, sample.ignored_instances = objects, none
        return sample


@DATASETS.register_module(name='SyntheticSegmented', force=True)
class Segmented(Samples):
    """Images with a map of classes in blocks of 16 pixels."""

    def annotate(self, index: int, height: int, width: int):
        from mmseg.structures import SegDataSample

        chance = np.random.default_rng(index % 997)
        blocks = chance.integers(0, self.classes, (-(-height // 16), -(-width // 16)))
        labels = np.kron(blocks, np.ones((16, 16), np.int64))[None, :height, :width]
        sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
        return sample.set_data(dict(gt_sem_seg=PixelData(data=torch.from_numpy(labels)))) or sample


KINDS = dict(mmpretrain='SyntheticClassified', mmdet='SyntheticDetected', mmseg='SyntheticSegmented')


def find_sizes(cfg, pixels=None) -> list:
    """Heights and widths of the images that a config trains on.

    Args:
        cfg (Config): The config.
        pixels (int, optional): A side that replaces the config's; of detection the shorter side. Default: None.

    Returns:
        list[tuple[int, int]]: One size; for detection several around 800x1216, as COCO's images have.
    """
    if cfg.default_scope == 'mmdet':
        short = pixels or 800
        shares = (1.5, 1.33, 1.52, 1.33, 1.6, 1.25, 1.5, 1.66, 1.4, 1.45)
        sizes = [(short, round(short * share)) for share in shares]
        return [size if i % 4 else size[::-1] for i, size in enumerate(sizes, 1)]
    if pixels:
        return [(pixels, pixels)]
    if cfg.default_scope == 'mmseg':
        size = cfg.get('crop_size') or (cfg.model.get('data_preprocessor') or {}).get('size') or (512, 512)
        return [tuple(size)]
    return [(_find_crop(cfg.get('train_pipeline') or ()) or 224,) * 2]


def find_classes(cfg) -> int:
    """The number of classes of a config's model, the first that it names."""
    found = list(_find('num_classes', cfg.model))
    return found[0] if found else 10


def _find(key: str, value):
    if isinstance(value, dict):
        if isinstance(value.get(key), int):
            yield value[key]
        for item in value.values():
            yield from _find(key, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _find(key, item)


def _find_crop(pipeline):
    for step in pipeline:
        if step.get('type') in CROPS:
            side = step.get('scale', step.get('crop_size'))
            return side[0] if isinstance(side, (list, tuple)) else side
    return None
