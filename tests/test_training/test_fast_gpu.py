"""The fast step on a GPU: mmengine's own numbers, no wait for the device, compiled with CUDA graphs."""

import contextlib

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmvmamba import ForeachEMA, VSSMBackbone
from mmvmamba.training.batches import send
from mmvmamba.training.compiling import compile_modules

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU is visible to torch')
STEPS, OVERFLOWS = 50, (3, 20, 21)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = VSSMBackbone(dict(dims=32, depths=(1, 1)), out_indices=(1,), drop_path_rate=0.0)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.backbone(x)[0].mean((2, 3)))


def make() -> Model:
    torch.manual_seed(0)
    return Model().cuda()


def build(model, fast: bool):
    """A float16 wrapper: ours, or mmengine's with the same fused optimizer."""
    cfg = dict(
        type='mmvmamba.FastOptimWrapper' if fast else 'AmpOptimWrapper',
        dtype='float16',
        loss_scale=dict(init_scale=2.0**12, growth_interval=7),
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
        clip_grad=dict(max_norm=0.5),
        paramwise_cfg=dict(norm_decay_mult=0.0),
    )
    return build_optim_wrapper(model, cfg)


def images(step: int) -> torch.Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(step)).cuda()


def run(model, wrapper, steps, overflows=()) -> list:
    losses = []
    for step in steps:
        with wrapper.optim_context(model):
            loss = nn.functional.cross_entropy(model(images(step)).float(), torch.arange(4).cuda())
        wrapper.update_params(loss * (float('inf') if step in overflows else 1.0))
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def test_fifty_steps_are_those_of_mmengine():
    """Kernels of the backbone give the same bits, so that what differs is the step's rounding."""
    models = [make(), make()]
    wrappers = [build(model, fast) for model, fast in zip(models, (False, True))]
    losses = [run(model, wrapper, range(STEPS), OVERFLOWS) for model, wrapper in zip(models, wrappers)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[0][-1] < losses[0][0]
    states = [wrapper.state_dict() for wrapper in wrappers]
    assert states[0]['loss_scaler'] == states[1]['loss_scaler']
    for key, theirs in states[0]['state'].items():
        assert theirs['step'] == states[1]['state'][key]['step'] == STEPS - len(OVERFLOWS)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters()):
        assert (one - two).norm() <= 1e-2 * (one - one.mean()).norm() + 1e-3, name


@contextlib.contextmanager
def no_wait():
    """Any wait of the host for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_the_host_waits_nowhere_in_a_step():
    model = make()
    wrapper, average = build(model, True), ForeachEMA(model, 1e-2)
    run(model, wrapper, range(2))
    for _ in range(2):
        average.update_parameters(model)
    target, stream = torch.arange(4).cuda(), torch.cuda.Stream()
    batch = dict(inputs=torch.rand(4, 3, 64, 64).pin_memory(), labels=[torch.tensor([i]) for i in range(4)])
    device = torch.device('cuda', torch.cuda.current_device())
    with no_wait():
        send(batch, device, stream)
        with wrapper.optim_context(model):
            loss = nn.functional.cross_entropy(model(batch['inputs']).float(), target)
        wrapper.update_params(loss)
        average.update_parameters(model)
    assert torch.cat(batch['labels']).tolist() == [0, 1, 2, 3]
    assert wrapper.message_hub.get_scalar('train/grad_norm').current() > 0


@pytest.mark.slow
@pytest.mark.parametrize('mode', [None, 'reduce-overhead'])
def test_compiled_as_in_eager_mode(mode):
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make()
        wrapper = build(model, True)
        if compiled:
            (forward,) = compile_modules(model, ['backbone'], shapes=4, dynamic=False, mode=mode)
        steps = []
        for step in range(10):
            torch.compiler.cudagraph_mark_step_begin()
            steps += run(model, wrapper, [step])
        losses.append(steps)
    assert not forward.failed
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
