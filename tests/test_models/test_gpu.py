"""Whole models on the GPU: the reference's numbers in float32, half precision close to it, the same bits every time."""

import pytest
import torch
import torch.nn.functional as F

from mmvmamba import VSSMBackbone
from mmvmamba.ops import backend_report
from tests.fill import make_input
from tests.test_models.test_reference import build

CUDA = next(status for status in backend_report() if status.name == 'cuda')
pytestmark = pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
TINIES = ('vmamba_tiny_s1l8', 'vmamba_tiny_s2l5', 'vanilla_vmamba_tiny')


@pytest.fixture(autouse=True)
def _full_float32():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def half(dtype=torch.float16):
    return torch.autocast('cuda', dtype)


@pytest.mark.parametrize('variant, size', [(TINIES[0], (72, 104)), *((variant, (64, 64)) for variant in TINIES)])
def test_logits(variant, size, tables, model_reference):
    model, x = build(variant, tables).cuda(), torch.from_numpy(make_input(*size)).cuda()
    expected = torch.from_numpy(model_reference[f'{variant}/{size[0]}x{size[1]}/logits']).cuda()
    with torch.no_grad():
        logits = model(x)
        assert (logits - expected).abs().max() < 5e-5 * expected.std()
        for dtype, limit in ((torch.float16, 0.01), (torch.bfloat16, 0.08)):
            with half(dtype):
                error = (model(x) - expected).square().mean().sqrt() / expected.std()
            assert error < limit, f'{dtype}: {error:.4f}'


@pytest.mark.parametrize('variant', TINIES)
def test_gradients_of_a_training_step(variant, tables):
    x = torch.from_numpy(make_input(224, 224)).cuda()
    labels = torch.tensor([3, 700], device='cuda')
    gradients = []
    for autocast in (False, True, True):
        model = build(variant, tables).cuda()
        with torch.autocast('cuda', torch.float16, enabled=autocast):
            loss = F.cross_entropy(model(x), labels)
        (loss * 256).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    exact, first, second = ([grad / 256 for grad in grads] for grads in gradients)
    difference = sum((a - b).square().sum() for a, b in zip(first, exact)).sqrt()
    assert difference < 0.02 * sum(grad.square().sum() for grad in exact).sqrt()
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize('size', [(4, 4), (4, 200), (200, 4), (33, 61), (37, 224)], ids=str)
def test_odd_sizes(size):
    """One pixel, one row and one column in the last stages; forward and every gradient against float64 on the CPU."""
    torch.manual_seed(0)
    model = VSSMBackbone(dict(dims=32, depths=(1, 1, 1, 1), drop_path_rate=0.0)).eval()
    x = torch.randn(1, 3, *size)
    results = []
    for place in (dict(device='cpu', dtype=torch.float64), dict(device='cuda', dtype=torch.float32)):
        model = model.to(**place).requires_grad_()
        model.zero_grad()
        outs = model(x.to(**place))
        sum((out * torch.linspace(-1, 1, out.numel(), **place).view_as(out)).sum() for out in outs).backward()
        results.append([*(out.detach() for out in outs), *(p.grad.clone() for p in model.parameters())])
    for value, expected in zip(results[1], results[0]):
        scale = expected.norm().clamp(min=1e-3)
        assert (value.cpu().double() - expected).norm() < 1e-3 * scale


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_device_that_is_not_current():
    """Every kernel of the backbone, forward and backward, on the second GPU while the first is current."""
    torch.manual_seed(0)
    model, x = VSSMBackbone('nano').train(), torch.randn(2, 3, 64, 96)
    results = []
    for device in ('cuda:0', 'cuda:1'):
        model = model.to(device)
        model.zero_grad()
        with half():
            outs = model(x.to(device))
        sum(out.float().square().mean() for out in outs).backward()
        results.append([*(out.detach().cpu() for out in outs), *(p.grad.cpu() for p in model.parameters())])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results))
