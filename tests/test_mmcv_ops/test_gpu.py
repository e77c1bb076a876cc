"""The stand-in on a GPU: against its results on the CPU, and compiled mmcv where that has its ops for GPUs."""

import numpy as np
import pytest
import torch

from mmvmamba.mmcv_ops.placing import compiled_file, mmcv_folder
from tests.test_mmcv_ops.cases import GROUPS, compute, load_compiled, make_boxes, make_rois
from tests.test_mmcv_ops.test_equality import StandIn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU is visible to torch')
ON_GPU = ('bbox_overlaps', 'roi_align_mean', 'deform_conv', 'modulated_deform_conv')
BOUND = 2e-6


class OnGpu:
    """Ops whose arguments are moved to the GPU and copied back."""

    def __init__(self, ops):
        self.ops = ops

    def __getattr__(self, name):
        def call(*arguments, **settings):
            moved = [value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments]
            result = getattr(self.ops, name)(*moved, **settings)
            for value, there in zip(arguments, moved):
                if isinstance(value, torch.Tensor) and value.shape == there.shape:
                    value.copy_(there)
            return result.cpu() if isinstance(result, torch.Tensor) else result

        return call


def has_cuda_ops():
    path = compiled_file(mmcv_folder())
    return path is not None and b'libcudart' in path.read_bytes()


def check(results, expected):
    assert len(results) == len(expected) > 0
    for i, (result, want) in enumerate(zip(results, expected)):
        usual = np.isfinite(want)
        assert np.array_equal(usual, np.isfinite(result)), f'case {i}'
        error = np.linalg.norm(result[usual] - want[usual])
        assert error <= BOUND * np.linalg.norm(want[usual]), f'case {i}: {error}'


@pytest.mark.parametrize('name', ON_GPU)
def test_a_gpu_gives_the_numbers_of_a_cpu(name):
    check(compute(OnGpu(StandIn()), name, 1), compute(StandIn(), name, 1))
    assert GROUPS[name][-1] < BOUND


@pytest.mark.skipif(not has_cuda_ops(), reason='mmcv is not compiled for GPUs here')
@pytest.mark.parametrize('name', ON_GPU[1:])
def test_compiled_mmcv_on_a_gpu(name):
    check(compute(OnGpu(StandIn()), name, 1), compute(OnGpu(load_compiled()), name, 1))


@pytest.mark.parametrize('offset', [0, 1])
def test_nms(offset):
    random = np.random.RandomState(0)
    others = [StandIn(), *([OnGpu(load_compiled())] if has_cuda_ops() else [])]
    for size in (1, 2, 50, 2000):
        boxes, scores = make_boxes(random, size, 'sparse')
        kept = OnGpu(StandIn()).nms(boxes, scores, iou_threshold=0.5, offset=offset)
        for ops in others:
            assert torch.equal(ops.nms(boxes, scores, iou_threshold=0.5, offset=offset), kept)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_roi_align_has_a_deterministic_gradient(dtype, monkeypatch):
    random = np.random.RandomState(0)
    rois = make_rois(random, 64, 2, 100, 'any').cuda()
    grad = torch.randn(64, 16, 7, 7, device='cuda').to(dtype)
    settings = dict(aligned_height=7, aligned_width=7, spatial_scale=0.25, sampling_ratio=0, pool_mode=1, aligned=True)
    empty, results = grad.new_zeros(0), []
    for deterministic in (True, True, False):
        torch.use_deterministic_algorithms(deterministic)
        results.append(grad.new_zeros(2, 16, 25, 30))
        StandIn().roi_align_backward(grad, rois, empty, empty, results[-1], **settings)
    assert torch.equal(*results[:2]) and results[0].any()
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert (results[0].float() - results[2].float()).norm() <= bound * results[2].float().norm()
