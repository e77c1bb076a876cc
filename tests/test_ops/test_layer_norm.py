"""layer_norm: torch's numbers in the dtype that was asked for."""

import pytest
import torch
import torch.nn.functional as F

from mmvmamba.ops import backend_report, layer_norm
from tests.test_ops.ss2d_inputs import relative_error, run

CUDA = next(status for status in backend_report() if status.name == 'cuda')
LIMITS = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def make_inputs(rows, channels, dtype=torch.float32, device='cpu'):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(rows, channels, generator=generator) + 1
    weight, bias, dy = (torch.randn(*shape, generator=generator) for shape in ((channels,), (channels,), x.shape))
    return x.to(device, dtype), [weight.to(device), bias.to(device)], dy.to(device)


def test_cpu_is_torchs_own():
    x, (weight, bias), _ = make_inputs(5, 12)
    assert torch.equal(layer_norm(x, weight, bias, 1e-3), F.layer_norm(x, (12,), weight, bias, 1e-3))
    assert layer_norm(x, weight, bias, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
@pytest.mark.parametrize(
    'dtypes', [(a, b) for a in LIMITS for b in LIMITS], ids=lambda pair: f'{pair}'.replace('torch.', '')
)
@pytest.mark.parametrize('shape', [(1, 4), (33, 36), (1001, 48), (777, 96), (257, 192), (65, 384), (20, 1024), (9, 30)])
def test_gpu_output_and_gradients(shape, dtypes):
    x, parameters, dy = make_inputs(*shape, dtypes[0], 'cuda')
    dy = dy.to(dtypes[1])
    results = run(lambda x, w, b: layer_norm(x, w, b, 1e-5, dtypes[1]), x, parameters, dy)
    reference = run(
        lambda x, w, b: F.layer_norm(x, shape[1:], w, b), x.double(), [p.double() for p in parameters], dy.double()
    )
    assert results[0].dtype == dtypes[1] and results[1].dtype == dtypes[0]
    for value, expected in zip(results, reference):
        assert relative_error(value, expected) < max(LIMITS[dtypes[0]], LIMITS[dtypes[1]])
    for first, second in zip(results, run(lambda x, w, b: layer_norm(x, w, b, 1e-5, dtypes[1]), x, parameters, dy)):
        assert torch.equal(first, second)


@pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
def test_is_a_well_behaved_op():
    x, parameters, _ = make_inputs(10, 32, device='cuda')
    leaves = [value.requires_grad_() for value in (x, *parameters)]
    torch.library.opcheck(torch.ops.mmvmamba.layer_norm.default, (*leaves, 1e-5, torch.float16, True))
