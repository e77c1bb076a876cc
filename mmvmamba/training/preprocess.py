"""Labels of a batch as one tensor, not as one a sample."""

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS as MMENGINE_MODELS

from mmvmamba.registry import MODELS


@MODELS.register_module()
class BatchClsDataPreprocessor(BaseDataPreprocessor):
    """mmpretrain's ``ClsDataPreprocessor``, which makes the scores for mixup and CutMix in one launch.

    mmpretrain launches at least one kernel a sample for them, which the host feels in batches of a hundred.  Values,
    random numbers and what the model gets are the same.  Batches of another kind (several labels or scores in a sample,
    images that are no single tensor, evaluation) go to mmpretrain's as they are.

    Args:
        **options: Those of ``ClsDataPreprocessor``.
    """

    def __init__(self, **options):
        super().__init__()
        self.inner: Any = MMENGINE_MODELS.build(dict(options, type='mmpretrain.ClsDataPreprocessor'))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'inner':
                raise
            return getattr(self.inner, name)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Preprocess a batch.

        Args:
            data (dict): ``inputs``, images (B, C, H, W) or a list of them (C, H, W), and maybe ``data_samples``.
            training (bool): Whether to mix images. Default: False.

        Returns:
            dict: ``inputs``, float32 images (B, C, H, W), and ``data_samples``.
        """
        inner, inputs = self.inner, data['inputs']
        samples: Any = data.get('data_samples')
        scored = training and inner.to_onehot and inner.num_classes and isinstance(inputs, torch.Tensor) and samples
        if not scored or not all(map(_has_one_label, samples)):
            return inner(data, training)
        images = inner(dict(inputs=inputs), training)['inputs']
        labels = torch.cat([sample.gt_label for sample in samples]).to(self.device)
        scores = F.one_hot(labels, inner.num_classes)
        if inner.batch_augments is not None:
            images, scores = inner.batch_augments(images, scores)
        for sample, label, score in zip(samples, labels.split(1), scores):
            sample.set_gt_label(label)
            sample.set_gt_score(score)
        return dict(inputs=images, data_samples=samples)


def _has_one_label(sample: Any) -> bool:
    label = sample.get('gt_label') if hasattr(sample, 'set_gt_score') else None
    return isinstance(label, torch.Tensor) and label.shape == (1,) and 'gt_score' not in sample
