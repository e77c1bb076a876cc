"""linear: a linear layer without bias, in one op for mixed precision on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from mmvmamba.ops import backend_report, linear
from tests.test_ops.ss2d_inputs import relative_error, run

CUDA = next(status for status in backend_report() if status.name == 'cuda')
needs_gpu = pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
HALF = (torch.float16, torch.bfloat16)


def make_inputs(rows, channels, out, device='cpu'):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, channels), (out, channels), (rows, out))
    x, weight, dy = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return x, weight * channels**-0.5, dy


def test_cpu_is_torchs_own():
    x, weight, _ = make_inputs(5, 12, 7)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast('cpu', torch.bfloat16):
        for value in (weight, weight.half()):
            assert torch.equal(linear(x, value), F.linear(x, value))
        assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert linear(x[:0], weight).shape == (0, 7)
    assert linear(x.to('meta'), weight.to('meta')).shape == (5, 7)


@pytest.mark.parametrize(
    'change, error, message',
    [
        (dict(x=None), TypeError, r'linear: x must be a tensor of shape \(\.\.\., C\), got NoneType'),
        (dict(x=torch.tensor(1.0)), ValueError, r'linear: x must have the dimensions \(\.\.\., C\), got shape \(\)'),
        (dict(weight=torch.ones(12)), ValueError, r'linear: weight must have the dimensions \(C_out, C\)'),
        (dict(weight=torch.ones(7, 13)), ValueError, r'linear: weight has shape \(7, 13\), expected \(7, 12\)'),
        (dict(weight=torch.ones(7, 12).int()), TypeError, r'weight must be a floating-point tensor, got int32'),
        (dict(weight=torch.ones(7, 12).half()), TypeError, r'linear: weight is float16, but x is float32; outside'),
    ],
)
def test_bad_input(change, error, message):
    x, weight, _ = make_inputs(5, 12, 7)
    with pytest.raises(error, match=message):
        linear(**{**dict(x=x, weight=weight), **change})


@needs_gpu
@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('shape', [(1, 8, 16), (33, 7, 5), (1001, 96, 192), (70000, 192, 96), (98, 768, 768)])
def test_gpu_output_and_gradients(shape, dtype):
    """Against float64 of what autocast computes with; from torch 2.8 on the weight's gradient is not rounded."""
    x, weight, dy = make_inputs(*shape, device='cuda')
    x, dy = x.to(dtype), dy.to(dtype)
    expected = run(F.linear, x.double(), [weight.to(dtype).double()], dy.double())
    with torch.autocast('cuda', dtype):
        results, again = run(linear, x, [weight], dy), run(linear, x, [weight], dy)
    rounding = torch.finfo(dtype).eps
    limits = (rounding, rounding, 5e-5 if torch.__version__ >= torch.torch_version.TorchVersion('2.8') else rounding)
    for value, truth, second, limit in zip(results, expected, again, limits):
        assert relative_error(value, truth) < limit
        assert torch.equal(value, second)
    assert [value.dtype for value in results] == [dtype, dtype, torch.float32]


@needs_gpu
def test_views_shapes_and_other_dtypes():
    x, weight, _ = make_inputs(24, 12, 7, device='cuda')
    for value in (x.view(2, 3, 4, 12), x.t().contiguous().t(), x[::2], x.view(2, 12, 12).transpose(0, 1)):
        assert relative_error(linear(value, weight), F.linear(value.double(), weight.double())) < 1e-5
        with torch.autocast('cuda', torch.bfloat16):
            assert relative_error(linear(value, weight), F.linear(value.double(), weight.double())) < 2e-2
    with torch.autocast('cuda', torch.float16):
        assert linear(x, weight.half()).dtype == torch.float16
        assert linear(x[:0], weight).shape == (0, 7)


@needs_gpu
def test_without_gradients_nothing_is_kept():
    x, weight, _ = make_inputs(64, 16, 8, device='cuda')
    assert torch.ops.mmvmamba.linear(x.half(), weight, False)[1].numel() == 0


@needs_gpu
def test_is_a_well_behaved_op():
    x, weight, _ = make_inputs(10, 32, 64, device='cuda')
    torch.library.opcheck(torch.ops.mmvmamba.linear.default, (x.half().requires_grad_(), weight.requires_grad_(), True))
