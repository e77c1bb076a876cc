"""The stand-in against compiled mmcv: its stored results everywhere, and live where it is installed."""

import numpy as np
import pytest
import torch

from mmvmamba.mmcv_ops.extension import FUNCTIONS
from tests.test_mmcv_ops.cases import GROUPS, STORED, compute, load_compiled


class StandIn:
    """The stand-in as a module."""

    __getattr__ = staticmethod(FUNCTIONS.__getitem__)


def check(name, results, expected):
    bound = GROUPS[name][-1]
    assert len(results) == len(expected) > 0
    for i, (result, want) in enumerate(zip(results, expected)):
        assert result.shape == want.shape and result.dtype == want.dtype, f'{name}, case {i}'
        same = (result == want) | ((result != result) & (want != want))  # an empty box over itself gives NaN
        if bound and not same.all():
            assert np.linalg.norm(result - want) <= bound * np.linalg.norm(want), f'{name}, case {i}'
        else:
            assert same.all(), f'{name}, case {i}'


@pytest.fixture(scope='module')
def stored():
    """Results of compiled mmcv 2.1.0 by group, a list of arrays each."""
    with np.load(STORED) as file:
        return {name: np.split(file[name], np.cumsum(file[f'{name}_sizes'])[:-1]) for name in GROUPS}


@pytest.mark.parametrize('name', GROUPS)
def test_stored_results_of_compiled_mmcv(name, stored):
    check(name, compute(StandIn(), name, GROUPS[name][2]), stored[name])


@pytest.mark.skipif(load_compiled() is None, reason='mmcv is not compiled here')
@pytest.mark.parametrize('name', GROUPS)
def test_compiled_mmcv_itself(name):
    check(name, compute(StandIn(), name, 2, seed=1), compute(load_compiled(), name, 2, seed=1))


@pytest.mark.skipif(load_compiled() is None, reason='mmcv is not compiled here')
def test_many_boxes_with_equal_scores():
    compiled, random = load_compiled(), np.random.RandomState(0)
    corners = random.uniform(0, 500, (3000, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + random.uniform(1, 80, (3000, 2))], 1).astype('f4'))
    scores = torch.from_numpy(random.randint(0, 50, 3000) / 50).float()
    for threshold, offset in ((0.7, 0), (0.3, 0), (0.5, 1)):
        settings = dict(iou_threshold=threshold, offset=offset)
        kept = compiled.nms(boxes, scores, **settings)
        assert 100 < len(kept) < 2900 and torch.equal(StandIn().nms(boxes, scores, **settings), kept)
