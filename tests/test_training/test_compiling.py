"""CompileHook and DeferredInfoHook in runs of mmengine's Runner; the backend ``eager`` traces and compiles nothing."""

import copy
import io

import pytest
import torch
from torch import nn

from mmvmamba.models import VSSMBackbone
from mmvmamba.training.compiling import CompiledForward, compile_modules
from mmvmamba.training.hooks import CompileHook
from tests.test_training.toy import make_runner

ARCH = dict(dims=8, depths=(1, 1))
HOOK = dict(type='mmvmamba.CompileHook', modules=('first', 'last'), backend='eager')


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(work_dir, hooks=(), deferred=False, **options):
    torch.manual_seed(0)  # the model is made before the Runner sets its seed
    runner = make_runner(work_dir, hooks=hooks, **options)
    if deferred:
        runner._hooks = [hook for hook in runner._hooks if type(hook).__name__ != 'RuntimeInfoHook']
        runner.register_hook(dict(type='mmvmamba.DeferredInfoHook'))
    runner.train()
    return runner


def same(one, two) -> bool:
    states = one.state_dict(), two.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_training_validation_and_resuming_are_the_same_compiled(tmp_path):
    plain = train(tmp_path / 'plain', scores=(1, 2))
    compiled = train(tmp_path / 'compiled', [HOOK], scores=(1, 2))
    assert same(plain.model, compiled.model)
    assert 'forward' not in compiled.model.first.__dict__, 'the model is as it was after training'
    resumed = train(tmp_path / 'compiled', [HOOK], scores=(1, 2, 3), epochs=3, resume=True)
    assert resumed.iter == 6 and resumed.model.state_dict().keys() == plain.model.state_dict().keys()


def test_what_runs_is_compiled(tmp_path):
    counts = []

    def backend(graph, inputs):
        counts.append(len(inputs))
        return graph.forward

    hook = CompileHook(modules=['first'], backend=backend)
    runner = make_runner(tmp_path, hooks=[hook])
    runner.train()
    assert len(counts) == 1, 'once for all iterations'
    hook = CompileHook(modules=['first'], backend=backend, enable=False)
    make_runner(tmp_path, hooks=[hook]).train()
    assert len(counts) == 1


def test_a_failure_is_one_warning(tmp_path, capfd):
    def backend(graph, inputs):
        raise OSError('no compiler is there')

    runner = train(tmp_path / 'failing', [CompileHook(modules=['first'], backend=backend)])
    text = ''.join(capfd.readouterr())
    assert text.count('first cannot be compiled here and runs without') == 1
    assert 'OSError: no compiler is there' in text
    assert same(runner.model, train(tmp_path / 'plain').model)


def test_an_error_of_the_model_is_its_own():
    model = nn.ModuleDict(dict(backbone=VSSMBackbone(ARCH, out_indices=(1,))))
    compile_modules(model, ['backbone'], backend='eager')
    with pytest.raises(ValueError, match=r'x has shape \(1, 4, 32, 32\)'):
        model.backbone(torch.rand(1, 4, 32, 32))


def test_further_shapes_run_as_they_are():
    module = nn.Linear(4, 2)
    sizes = []

    def backend(graph, inputs):
        sizes.append(inputs[-1].shape[0])
        return graph.forward

    module.forward = CompiledForward(module, 'linear', shapes=2, backend=backend, dynamic=False)
    for batch in (3, 5, 6, 7, 3, 5):
        assert module(torch.rand(batch, 4)).shape == (batch, 2)
    assert sizes == [3, 5]


@pytest.mark.parametrize('dynamic, with_cp', [(False, False), (True, True)])
def test_a_backbone_compiled_by_the_switch_has_the_same_gradients(dynamic, with_cp):
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(backbone=VSSMBackbone(ARCH, out_indices=(0, 1), with_cp=with_cp)))
    names = list(model.state_dict())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    switched = compile_modules(model, ['backbone'], dynamic=dynamic, backend=backend)[0]
    for size in ((32, 40), (40, 56)):
        x = torch.rand(2, 3, *size)
        results = []
        for forward in (switched.plain, switched):
            model.zero_grad()
            outs = forward(x)
            sum(out.square().mean() for out in outs).backward()
            results.append([*outs, *(p.grad.clone() for p in model.parameters())])
        for one, two in zip(*results):
            torch.testing.assert_close(one, two)
    assert len(graphs) == (1 if dynamic else 2)
    assert list(model.state_dict()) == names


def test_copies_and_pickles_run_as_they_are():
    model = nn.ModuleDict(dict(backbone=nn.Linear(4, 2)))
    compile_modules(model, ['backbone'], backend='eager')
    assert isinstance(model.backbone.forward, CompiledForward)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not isinstance(other.backbone.forward, CompiledForward)
        with torch.no_grad():
            other.backbone.weight.zero_()
        assert torch.equal(other.backbone(torch.rand(1, 4))[0], other.backbone.bias)
        assert not torch.equal(model.backbone(torch.rand(1, 4))[0], other.backbone.bias)


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(TypeError, match="modules is 'backbone', expected names"):
        CompileHook(modules='backbone')
    with pytest.raises(ValueError, match="mode is 'reduce-overhead' with dynamic=True"):
        CompileHook(dynamic=True, mode='reduce-overhead')
    with pytest.raises(ValueError, match=r"modules are \['backbone'\], but Toy has no backbone"):
        make_runner(tmp_path, hooks=[CompileHook()]).train()


@pytest.mark.parametrize('counts', [1, 2])
def test_no_graphs_under_gradient_accumulation(counts, tmp_path, monkeypatch):
    asked: list = []
    monkeypatch.setattr(torch, 'compile', lambda function, **options: asked.append(options) or function)
    runner = make_runner(tmp_path, hooks=[CompileHook(modules=['first'], mode='reduce-overhead')])
    runner.optim_wrapper['accumulative_counts'] = counts
    runner.train()
    assert asked[0].get('mode') == ('reduce-overhead' if counts == 1 else None)
    log = ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    assert ("mode='reduce-overhead' is left out with accumulative_counts=2" in log) == (counts == 2)


def test_losses_are_read_when_the_logger_logs(tmp_path, monkeypatch):
    plain = train(tmp_path / 'plain')
    hub = plain.message_hub
    deferred = train(tmp_path / 'deferred', deferred=True)
    for key in ('train/loss', 'train/lr'):
        ours, theirs = (h.get_scalar(key).data for h in (deferred.message_hub, hub))
        assert ours[0].tolist() == theirs[0].tolist() and ours[1].tolist() == theirs[1].tolist() and len(ours[0]) == 4
    files = [torch.load(tmp_path / name / 'epoch_2.pth', weights_only=True) for name in ('plain', 'deferred')]
    logs = [file['message_hub']['log_scalars']['train/loss'].data[0].tolist() for file in files]
    assert logs[0] == logs[1]
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, 'item', lambda self: (reads.append(self.shape), item(self))[1])
    counts = []
    for name, deferred in (('many', False), ('few', True)):
        reads.clear()
        train(tmp_path / name, deferred=deferred)
        counts.append(len(reads))
    assert counts[0] - counts[1] == 4, 'mmengine reads the loss at each iteration'


PLAIN = dict(ema=dict(type='EMAHook', momentum=0.1), wrapper=dict(type='OptimWrapper'), hooks=())
FAST = dict(
    ema=dict(type='EMAHook', momentum=0.1, ema_type='mmvmamba.ForeachEMA'),
    wrapper=dict(type='mmvmamba.FastOptimWrapper'),
    hooks=(HOOK, dict(type='mmvmamba.PrefetchHook')),
)


def run_by(way, work_dir, epochs, resume=False):
    """A run that ExactResumeHook makes repeatable, with averaged weights and clipping; the fast way or mmengine's."""
    torch.manual_seed(0)
    hooks = [dict(type='mmvmamba.ExactResumeHook'), way['ema'], *way['hooks']]
    runner = make_runner(work_dir, epochs=epochs, hooks=hooks, resume=resume)
    runner.optim_wrapper.update(way['wrapper'], clip_grad=dict(max_norm=1.0))
    runner.optim_wrapper['optimizer']['fused'] = way is FAST
    if way is FAST:
        runner._hooks = [hook for hook in runner._hooks if type(hook).__name__ != 'RuntimeInfoHook']
        runner.register_hook(dict(type='mmvmamba.DeferredInfoHook'))
    runner.train()
    return torch.load(work_dir / f'epoch_{epochs}.pth', weights_only=True)


@pytest.mark.parametrize('first, second', [(PLAIN, FAST), (FAST, PLAIN), (FAST, FAST)], ids=['to', 'from', 'within'])
def test_a_run_resumes_by_the_other_way(first, second, tmp_path):
    whole = run_by(PLAIN if first is not second else FAST, tmp_path / 'whole', 3)
    run_by(first, tmp_path / 'half', 2)
    resumed = run_by(second, tmp_path / 'half', 3, resume=True)
    assert whole.keys() == resumed.keys()
    for part in ('state_dict', 'ema_state_dict'):
        for name, value in whole[part].items():
            if first is second:  # one way repeats itself bit for bit, resumed or not
                assert torch.equal(resumed[part][name], value), name
            torch.testing.assert_close(resumed[part][name], value, rtol=2e-5, atol=2e-6)
    logs = [file['message_hub']['log_scalars'] for file in (whole, resumed)]
    for key in ('train/loss', 'train/grad_norm', 'train/lr'):
        numbers = [log[key].data[0].tolist() for log in logs]
        assert len(numbers[0]) == 6 and numbers[1] == pytest.approx(numbers[0], rel=1e-4)
