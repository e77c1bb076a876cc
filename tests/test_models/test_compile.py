"""The backbone under torch.compile: one graph, static and dynamic, inference and training; layouts on the GPU."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mmvmamba import VSSMBackbone
from mmvmamba.ops import backend_report

CUDA = next(status for status in backend_report() if status.name == 'cuda')
needs_gpu = pytest.mark.skipif(not CUDA.available, reason=CUDA.reason)
SMALL = dict(dims=16, depths=(1, 1), drop_path_rate=0.0)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(**options):
    torch.manual_seed(0)
    return VSSMBackbone(SMALL, out_indices=(0, 1), **options)


def train_step(model, x):
    outs = model(x)
    sum(out.float().square().mean() for out in outs).backward()
    return [out.detach() for out in outs]


def test_inference_is_one_graph():
    model, x = small().eval(), torch.randn(1, 3, 20, 28)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for out, expected in zip(compiled(x), model(x)):
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('with_cp', [False, True])
def test_training_is_one_graph(with_cp):
    x = torch.randn(1, 3, 20, 28)
    model, compiled = small(with_cp=with_cp).train(), small(with_cp=with_cp).train()
    expected = train_step(model, x)
    for out, reference in zip(train_step(torch.compile(compiled, fullgraph=True, backend='aot_eager'), x), expected):
        torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-5)
    for value, reference in zip(compiled.parameters(), model.parameters()):
        torch.testing.assert_close(value.grad, reference.grad, rtol=1e-4, atol=1e-6)


def test_autocast_is_traced():
    model, x = small().eval(), torch.randn(1, 3, 20, 28)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        for out, expected in zip(compiled(x), model(x)):
            assert out.dtype == expected.dtype
            torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


def test_other_sizes_recompile_at_most_twice():
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(small().eval(), fullgraph=True, backend=counter)
    with torch.no_grad():
        for size in ((20, 28), (24, 36), (32, 20), (44, 52), (28, 28)):
            compiled(torch.randn(1, 3, *size))
    assert counter.frame_count <= 3


@needs_gpu
@pytest.mark.parametrize('mode', [None, 'reduce-overhead'])
def test_gpu_inference(mode):
    model, x = small().cuda().eval(), torch.randn(2, 3, 64, 96, device='cuda')
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad(), torch.autocast('cuda', torch.float16):
        for _ in range(3):
            outs = [out.clone() for out in compiled(x)]
        for out, expected in zip(outs, model(x)):
            assert (out - expected).square().mean().sqrt() < 0.01 * expected.std()


@needs_gpu
@pytest.mark.parametrize('with_cp', [False, True])
def test_gpu_training(with_cp):
    x = torch.randn(2, 3, 64, 96, device='cuda')
    model, compiled = small(with_cp=with_cp).cuda().train(), small(with_cp=with_cp).cuda().train()
    with torch.autocast('cuda', torch.float16):
        train_step(model, x)
        train_step(torch.compile(compiled, fullgraph=True), x)
    for value, reference in zip(compiled.parameters(), model.parameters()):
        assert (value.grad - reference.grad).norm() < 0.02 * reference.grad.norm() + 1e-6


@needs_gpu
def test_no_map_changes_its_layout_on_the_gpu():
    model = VSSMBackbone(SMALL, out_indices=(1,)).cuda().eval()
    x = torch.randn(2, 3, 64, 64, device='cuda').to(memory_format=torch.channels_last)
    with torch.no_grad():
        model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(x)
            torch.cuda.synchronize()
    copies = sum(event.count for event in profile.key_averages() if 'copy_kernel' in event.key)
    assert copies <= 4  # the output, which is contiguous, and the weights of three small convolutions
