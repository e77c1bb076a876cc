"""FastOptimWrapper and ForeachEMA: mmengine's numbers and checkpoints, over fifty steps with overflows in between."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from mmvmamba import FastOptimWrapper, ForeachEMA
from mmvmamba.training.scalars import PendingHistory, pending_history

STEPS, OVERFLOWS = 50, (3, 20, 21)
# one factor instead of two products, and fused kernels: rounding errors of float32 that fifty steps add up
TOLERANCE = dict(rtol=2e-5, atol=2e-6)


class TheirAmp(OptimWrapper):
    """The step of mmengine's ``AmpOptimWrapper``, which refuses to be built without a GPU."""

    def __init__(self, optimizer, loss_scale='dynamic', **kwargs):
        super().__init__(optimizer, **kwargs)
        options = loss_scale if isinstance(loss_scale, dict) else {}
        self.loss_scaler = torch.amp.GradScaler('cpu', **options)

    def backward(self, loss):
        self.loss_scaler.scale(loss).backward()
        self._inner_count += 1

    def step(self):
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()

    def state_dict(self):
        return dict(super().state_dict(), loss_scaler=self.loss_scaler.state_dict())

    def load_state_dict(self, state):
        state = dict(state)
        self.loss_scaler.load_state_dict(state.pop('loss_scaler'))
        self.optimizer.load_state_dict(state)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.BatchNorm1d(16), nn.Linear(16, 3))


def build(model, fast: bool, amp: bool, fused: bool = True, **options):
    """A wrapper by mmengine's own builder, with a group for each parameter."""
    optimizer = dict(type='AdamW', lr=1e-2, weight_decay=0.05, **(dict(fused=True) if fast and fused else {}))
    cfg = dict(type='OptimWrapper', optimizer=optimizer, paramwise_cfg=dict(norm_decay_mult=0.0), **options)
    if amp:
        cfg['loss_scale'] = dict(init_scale=2.0**12, growth_interval=7)
    if fast:
        cfg.update(type='mmvmamba.FastOptimWrapper', **(dict(dtype='bfloat16') if amp else {}))
    elif amp:
        cfg['type'] = TheirAmp
    return build_optim_wrapper(model, cfg)


def run(model, wrapper, first=0, last=STEPS, overflows=OVERFLOWS) -> list:
    """Train; the norms that were logged."""
    hub, norms = MessageHub.get_current_instance(), []
    for step in range(first, last):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x[:, :3]).square().mean()
        if step in overflows:
            loss = loss * float('inf')
        hub.log_scalars.pop('train/grad_norm', None)
        wrapper.update_params(loss)
        if 'train/grad_norm' in hub.log_scalars:
            norms.append(float(hub.get_scalar('train/grad_norm').current()))
    return norms


def compare(one: nn.Module, two: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        torch.testing.assert_close(a, b, **TOLERANCE, msg=lambda text, name=name: f'{name}: {text}')


@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'amp'])
@pytest.mark.parametrize('options', [{}, dict(clip_grad=dict(max_norm=1.0)), dict(accumulative_counts=3)], ids=str)
def test_fifty_steps_are_those_of_mmengine(amp, options):
    """Steps whose gradients overflow are skipped alike, and the scale and the moments go on alike."""
    models = [make_model(), make_model()]
    wrappers = [build(model, fast, amp, **options) for model, fast in zip(models, (False, True))]
    overflows = OVERFLOWS if amp else ()
    norms = [run(model, wrapper, overflows=overflows) for model, wrapper in zip(models, wrappers)]
    compare(*models)
    assert not torch.equal(models[1][0].weight, make_model()[0].weight)
    states = [wrapper.state_dict() for wrapper in wrappers]
    assert states[0].get('loss_scaler') == states[1].get('loss_scaler')
    assert states[0]['state'].keys() == states[1]['state'].keys()
    updates = STEPS // 3 if 'accumulative_counts' in options else STEPS
    skipped = {step // 3 for step in overflows} if 'accumulative_counts' in options else overflows
    for key, theirs in states[0]['state'].items():
        ours = states[1]['state'][key]
        assert theirs['step'] == ours['step'] == updates - len(skipped)
        torch.testing.assert_close(theirs['exp_avg'], ours['exp_avg'], **TOLERANCE)
    if 'clip_grad' in options:
        finite = [(a, b) for i, (a, b) in enumerate(zip(*norms)) if i not in overflows]
        assert len(norms[1]) == STEPS and min(max(pair) for pair in finite) < 1 < max(norms[1])
        assert [b for _, b in finite] == pytest.approx([a for a, _ in finite], rel=1e-4)


@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'amp'])
@pytest.mark.parametrize('first', ['theirs', 'ours'])
def test_a_run_resumes_from_the_other_wrapper(amp, first):
    """Half by one, half by the other, through a file: as one run of mmengine's."""
    options = dict(clip_grad=dict(max_norm=1.0))
    overflows = OVERFLOWS if amp else ()
    whole = make_model()
    run(whole, build(whole, False, amp, **options), overflows=overflows)
    model = make_model()
    wrapper = build(model, first == 'ours', amp, **options)
    run(model, wrapper, last=25, overflows=overflows)
    state = copy.deepcopy(wrapper.state_dict())
    wrapper = build(model, first == 'theirs', amp, **options)
    wrapper.load_state_dict(state)
    run(model, wrapper, first=25, overflows=overflows)
    compare(whole, model)
    if first == 'theirs':
        assert all(group['fused'] for group in wrapper.optimizer.param_groups)


def test_checkpoints_of_another_precision_load():
    model = make_model()
    amp, plain = build(model, True, True), build(model, True, False)
    run(model, amp, last=2)
    plain.load_state_dict(amp.state_dict())
    state = plain.state_dict()
    assert 'loss_scaler' not in state and state['state'][0]['step'] == 2
    before = amp.state_dict()['loss_scaler']
    amp.load_state_dict(state)
    assert amp.state_dict()['loss_scaler'] == before


@pytest.mark.parametrize('clip', [dict(type='value', clip_value=0.01), dict(max_norm=0.1, norm_type=float('inf'))])
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'amp'])
def test_other_ways_to_clip(clip, fused, amp):
    models = [make_model(), make_model()]
    for model, fast in zip(models, (False, True)):
        run(model, build(model, fast, amp, fused, clip_grad=dict(clip)), last=12, overflows=(3,) if amp else ())
    compare(*models)


def test_the_host_reads_nothing_before_the_logger_does(monkeypatch):
    model = make_model()
    wrapper = build(model, True, True, clip_grad=dict(max_norm=1.0))
    run(model, wrapper, last=1)
    hub = MessageHub.get_current_instance()
    hub.log_scalars.pop('train/grad_norm')

    def refuse(*_, **__):
        raise AssertionError('the host read a tensor')

    with monkeypatch.context() as patch:
        for name in ('item', 'tolist', '__float__', '__bool__'):
            patch.setattr(torch.Tensor, name, refuse)
        for step in range(4):
            x = torch.randn(8, 6)
            wrapper.update_params(model(x).square().mean() * (float('inf') if step == 2 else 1.0))
    history = hub.get_scalar('train/grad_norm')
    logs, counts = history.data
    assert len(logs) == len(counts) == 4 and not torch.tensor(logs[2]).isfinite()
    assert history.mean(1) == logs[-1] > 0


def test_parameter_groups_are_back_after_a_step_that_fails():
    model = make_model()
    wrapper = build(model, True, False, clip_grad=dict(max_norm=1.0))
    groups = wrapper.optimizer.param_groups
    seen = []

    def fail(optimizer, *_):
        seen.append(len(optimizer.param_groups))
        raise RuntimeError('stop')

    wrapper.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match='stop'):
        wrapper.update_params(model(torch.rand(4, 6)).sum())
    assert seen == [2]  # weights that decay, and the others
    assert wrapper.optimizer.param_groups is groups and len(groups) == 8
    assert not hasattr(wrapper.optimizer, 'grad_scale')


def test_settings_that_cannot_be_compared_leave_the_groups():
    models = [make_model(), make_model()]
    for model, fast in zip(models, (False, True)):
        wrapper = build(model, fast, False)
        for group in wrapper.optimizer.param_groups:
            group['betas'] = [0.9, 0.999]
        run(model, wrapper, last=3, overflows=())
    compare(*models)


def test_wrong_options_are_named():
    optimizer = torch.optim.AdamW(make_model().parameters())
    with pytest.raises(ValueError, match="dtype is 'float8', expected 'float16', 'bfloat16' or None"):
        FastOptimWrapper(optimizer, dtype='float8')
    with pytest.raises(ValueError, match="loss_scale is 'static', expected 'dynamic'"):
        FastOptimWrapper(optimizer, dtype='float16', loss_scale='static')
    with pytest.raises(TypeError, match='loss_scale is True'):
        FastOptimWrapper(optimizer, dtype='float16', loss_scale=True)
    with pytest.raises(ValueError, match='expected none in float32'):
        FastOptimWrapper(optimizer, loss_scale='dynamic')


@pytest.mark.parametrize('options', [{}, dict(interval=3), dict(update_buffers=True)], ids=str)
def test_the_average_is_mmengines_bit_for_bit(options):
    model = make_model()
    averages = [ExponentialMovingAverage(model, 0.01, **options), ForeachEMA(model, 0.01, **options)]
    wrapper = build(model, True, False)
    for step in range(STEPS):
        run(model, wrapper, step, step + 1, overflows=())
        for average in averages:
            average.update_parameters(model)
    theirs, ours = (average.state_dict() for average in averages)
    assert theirs.keys() == ours.keys() and ours['steps'] == STEPS
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert not torch.equal(ours['module.0.weight'], model[0].weight)
    averages[0].load_state_dict(ours)
    other = copy.deepcopy(averages[1])
    other.update_parameters(make_model())
    assert other.steps == STEPS + 1 and averages[1].steps == STEPS
    with pytest.raises(ValueError, match='other parameters or buffers'):
        averages[1].update_parameters(model[0])


def test_replaced_buffers_and_weights_are_those_that_count():
    model = make_model()
    average = ForeachEMA(model, 0.5)
    average.update_parameters(model)
    model[3].running_mean = torch.full((16,), 3.0)
    model[0].weight = nn.Parameter(torch.zeros(16, 6))
    before = average.module[0].weight.clone()
    average.update_parameters(model)
    assert (average.module[3].running_mean == 3).all()
    assert torch.equal(average.module[0].weight, before / 2)


def test_numbers_wait_for_their_reader_and_copy_as_plain_ones():
    hub = MessageHub('pending')
    hub.update_scalar('train/loss', 1.0)
    history = pending_history(hub, 'train/loss')
    assert pending_history(hub, 'train/loss') is history
    history.update(torch.tensor(2.0))
    history.update(3, 2)
    assert history.current() == 3 and len(history._pending) == 2
    assert history.statistics('max', 2) == 3 and not history._pending
    assert history.mean() == (1 + 2 + 3) / 4
    history.update(torch.tensor([4.0], dtype=torch.float16))
    state = hub.state_dict()['log_scalars']['train/loss']
    assert type(state) is HistoryBuffer and state.data[0].tolist() == [1, 2, 3, 4]
    assert isinstance(hub.get_scalar('train/loss'), PendingHistory)
    with pytest.raises(TypeError, match=r'log_val has shape \(2,\)'):
        history.update(torch.zeros(2))
    with pytest.raises(TypeError, match='log_val is of type str'):
        history.update('1')
    with pytest.raises(TypeError, match='count is of type str'):
        history.update(1, '1')
    for _ in range(2000):
        history.update(torch.tensor(1.0))
    assert len(history._pending) < 1000


def test_two_processes_are_one(tmp_path):
    """A compiled backbone in DistributedDataParallel with the configs' settings, against one process by mmengine."""
    root = Path(__file__).parents[2]
    command = [sys.executable, '-m', 'tests.test_training.fast_distributed', str(tmp_path / 'out')]
    subprocess.run(command, cwd=root, check=True, env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=300)
    one, two = (torch.load(tmp_path / f'out.{n}', weights_only=True) for n in (1, 2))
    for part in ('weights', 'average'):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-4, atol=1e-5, msg=f'{part} {name}')
