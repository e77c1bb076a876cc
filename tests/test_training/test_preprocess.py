"""BatchClsDataPreprocessor gives what mmpretrain's preprocessor gives, with the same random numbers."""

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

OPTIONS = dict(num_classes=5, mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)
MIX = dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])


def samples(kind: str) -> list:
    labels = [[i % 5, 4] for i in range(6)] if kind == 'several' else list(range(5)) + [0]
    made = [DataSample().set_gt_label(label) for label in labels]
    return [sample.set_gt_score(torch.rand(5)) for sample in made] if kind == 'scores' else made


def build(kind: str, **options):
    init_default_scope('mmpretrain')
    return MODELS.build(dict(OPTIONS, type=kind, **options))


@pytest.mark.parametrize('kind', ['labels', 'several', 'scores', 'none'])
@pytest.mark.parametrize('mix', [MIX, None], ids=['mix', 'plain'])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('stacked', [True, False], ids=['tensor', 'list'])
def test_the_same_batch(kind, mix, training, stacked):
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    results = []
    for name in ('ClsDataPreprocessor', 'mmvmamba.BatchClsDataPreprocessor'):
        preprocessor = build(name, **(dict(batch_augments=mix) if mix else dict(to_onehot=True)))
        torch.manual_seed(0)
        np.random.seed(0)
        data = dict(inputs=images.clone() if stacked else list(images.clone()))
        if kind != 'none':
            data['data_samples'] = samples(kind)
        results.append((preprocessor(data, training), torch.rand(1), np.random.rand(), preprocessor))
    (theirs, *random, _), (ours, *same, preprocessor) = results
    assert random == same and preprocessor.num_classes == 5
    assert torch.equal(theirs['inputs'], ours['inputs']) and ours['inputs'].dtype == torch.float32
    if kind == 'none':
        assert ours['data_samples'] is None
        return
    for one, two in zip(theirs['data_samples'], ours['data_samples']):
        assert set(one.keys()) == set(two.keys()) and one.metainfo == two.metainfo
        for key in one.keys():  # noqa: SIM118  (no dict)
            assert one.get(key).dtype == two.get(key).dtype and torch.equal(one.get(key), two.get(key)), key


def test_names_of_weights_stay():
    assert not build('mmvmamba.BatchClsDataPreprocessor', batch_augments=MIX).state_dict()
    with pytest.raises(AttributeError, match='nothing'):
        build('mmvmamba.BatchClsDataPreprocessor').nothing  # noqa: B018
