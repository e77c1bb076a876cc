"""A trace (``torch.jit.trace``, which tools that count FLOPs use) holds what the model computes, on any backend."""

import pytest
import torch
from mmengine.analysis import get_model_complexity_info

from mmvmamba import VSSMBackbone
from mmvmamba.ops import use_backend

ARCHS = dict(
    s1=dict(dims=8),
    s2=dict(dims=8, d_state=2),
    cascade=dict(dims=8, scan_mode='cascade2d'),
    position=dict(dims=8, pos_embed=True, img_size=32),
    m2=dict(dims=16, core='ssd', d_state=4, ssm_ratio=2.0),
)
pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),
]


@pytest.mark.parametrize('backend', ['naive', 'cpu'])
@pytest.mark.parametrize('arch', ARCHS)
def test_traced_model_equals_the_model(arch, backend):
    torch.manual_seed(0)
    model = VSSMBackbone(dict(depths=(1, 1), **ARCHS[arch]), out_indices=(0, 1)).eval()
    image = torch.rand(1, 3, 32, 32)
    with use_backend(backend), torch.no_grad():
        traced = torch.jit.trace(model, image, check_trace=False)
        for found, expected in zip(traced(image), model(image), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('arch', ['s1', 'm2'])
def test_torch_checks_its_trace(arch):
    """By another one without gradients, which must be the same."""
    model = VSSMBackbone(dict(depths=(1, 1), **ARCHS[arch]), out_indices=(0, 1)).eval()
    traced = torch.jit.trace(model, torch.rand(1, 3, 32, 32))
    loss = sum(out.square().sum() for out in traced(torch.rand(1, 3, 32, 32)))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_mmengine_counts_norms_as_torchs_own():
    model = VSSMBackbone(dict(dims=8, depths=(1, 1)), out_indices=(1,)).eval()
    found = get_model_complexity_info(model, (3, 32, 32), show_table=False)
    counts = found['flops']
    with use_backend('naive', ['layer_norm', 'linear', 'mlp']):
        assert counts == get_model_complexity_info(model, (3, 32, 32), show_table=False)['flops']
    assert 'mmvmamba::layer_norm' not in str(found)
