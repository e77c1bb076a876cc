"""Masks of a batch that the data loader's workers pad, not the process that trains.

mmdet's preprocessor pads the masks of every object to the size of the batch, in several copies.  For two images of
COCO that is some 10 ms an iteration of the process that launches kernels.
"""

import functools
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate

from mmvmamba.registry import FUNCTIONS


@FUNCTIONS.register_module()
def pad_masks_collate(samples: list, pad_size_divisor: int = 1) -> dict:
    """mmengine's ``pseudo_collate``, with the masks of the batch padded as mmdet's preprocessor would.

    In a config: ``train_dataloader = dict(collate_fn=dict(type='mmvmamba.pad_masks_collate', pad_size_divisor=32))``.
    Where the preprocessor asks for another size it pads as ever.  Polygons stay as they are.

    Args:
        samples (list[dict]): ``inputs``, an image (C, H, W), and ``data_samples``, mmdet's ``DetDataSample``.
        pad_size_divisor (int): That of the config's data preprocessor. Default: 1.

    Returns:
        dict: ``inputs``, a list of the images, and ``data_samples``.

    Raises:
        ValueError: If ``pad_size_divisor`` is not positive.
    """
    if pad_size_divisor < 1:
        raise ValueError(f'pad_size_divisor is {pad_size_divisor}, expected at least 1')
    batch: Any = pseudo_collate(samples)
    sides = torch.tensor([image.shape[-2:] for image in batch['inputs']]).amax(dim=0).tolist()
    height, width = (-(-side // pad_size_divisor) * pad_size_divisor for side in sides)
    for sample in batch['data_samples']:
        objects = sample.get('gt_instances')
        masks: Any = None if objects is None else objects.get('masks')
        # polygons are lists, and padded ones know what they were
        if isinstance(getattr(masks, 'masks', None), np.ndarray) and not hasattr(masks, 'inner'):
            array = np.zeros((len(masks), height, width), masks.masks.dtype)
            array[:, : masks.height, : masks.width] = masks.masks
            base: Any = type(masks)
            objects.masks = _padded(base)(array, (masks.height, masks.width))
    return batch


@functools.cache
def _padded(base: Any) -> Any:
    """The class of masks like those of ``base``, mmdet's ``BitmapMasks``, that are padded with 0 already."""

    class PaddedMasks(base):
        """Masks for which padding to their own size costs nothing."""

        def __init__(self, masks: np.ndarray, inner: tuple):
            super().__init__(masks, *masks.shape[1:])
            self.inner = inner  # height and width before

        def pad(self, out_shape, pad_val=0):
            if pad_val == 0 and tuple(out_shape) == (self.height, self.width):
                return self
            height, width = self.inner
            return base(self.masks[:, :height, :width], height, width).pad(out_shape, pad_val)

        def __reduce__(self):
            # tensors travel between processes in shared memory, arrays through a pipe
            return _from_tensor, (base, torch.from_numpy(self.masks), self.inner)

    return PaddedMasks


def _from_tensor(base: Any, masks: torch.Tensor, inner: tuple):
    return _padded(base)(masks.numpy(), inner)
