"""The guard stops at the first bad number, names where it arose, and keeps the batch."""

import pytest
import torch

from mmvmamba.training.hooks import NaNGuardHook, NonFiniteError

from .toy import make_runner

GUARD = dict(type='mmvmamba.NaNGuardHook')


def train(runner):
    with pytest.raises(NonFiniteError) as caught:
        runner.train()
    return str(caught.value)


def test_healthy_training_is_not_changed(tmp_path):
    plain, guarded = make_runner(tmp_path / 'plain'), make_runner(tmp_path / 'guarded', hooks=[GUARD])
    guarded.model.load_state_dict(plain.model.state_dict())
    for runner in (plain, guarded):
        torch.manual_seed(3)
        runner.train()
    states = plain.model.state_dict(), guarded.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not list((tmp_path / 'guarded').glob('nan_*'))
    assert not guarded.model._forward_hooks and not guarded.model._forward_pre_hooks


def test_the_module_is_named_and_the_batch_saved(tmp_path):
    runner = make_runner(tmp_path, hooks=[GUARD])
    runner.model.fault[3] = lambda x: x + 1000  # exp(1000) is infinite
    message = train(runner)
    assert (
        'iteration 3' in message and 'arises in exponential (Exponential)' in message and 'infinite of the' in message
    )
    (path,) = tmp_path.glob('nan_iter_3_rank0.pth')
    saved = torch.load(path, weights_only=True)
    assert saved['batch']['inputs'].shape == (8, 4) and saved['iter'] == 3
    # the weights are those before the bad update: from them and the batch the loss can be seen again
    runner.model.load_state_dict(saved['state_dict'])
    torch.set_rng_state(saved['random_state']['torch'])
    assert not runner.model(**saved['batch'], mode='loss')['loss'].isfinite()


@pytest.mark.parametrize('norm', [False, True])
def test_a_bad_batch_is_told_from_a_bad_model(tmp_path, norm):
    runner = make_runner(tmp_path, hooks=[GUARD], norm=norm)
    runner.train_dataloader.dataset.__class__ = type(
        'Bad',
        (type(runner.train_dataloader.dataset),),
        dict(__getitem__=lambda self, i: dict(inputs=torch.full((4,), float('nan')), labels=torch.tensor(0.0))),
    )
    assert 'the input batch already contains 32 NaN' in train(runner)
    saved = torch.load(tmp_path / 'nan_iter_0_rank0.pth', weights_only=True)
    assert all(value.isfinite().all() for value in saved['state_dict'].values())
    assert not norm or saved['state_dict']['norm.num_batches_tracked'] == 0


def averages_before(runner, step):
    """The running averages at the start of a step, in a dict that is filled when the step comes."""
    before, train_step = {}, runner.model.train_step

    def note(data, optim_wrapper):
        if runner.model.calls == step:
            before.update((name, value.clone()) for name, value in runner.model.norm.named_buffers())
        return train_step(data, optim_wrapper)

    runner.model.train_step = note
    return before


@pytest.mark.parametrize(
    'fault, place',
    [
        (lambda x: x + 1000, 'arises in exponential (Exponential)'),
        (lambda x: x + 0 * (x * 0).abs().sqrt(), 'that of the output of dropout'),  # the gradient, see below
    ],
    ids=['module', 'gradient'],
)
def test_running_averages_are_saved_as_they_were(tmp_path, fault, place):
    """The bad forward pass and the inspection have written into them by then."""
    runner = make_runner(tmp_path, hooks=[GUARD], norm=True)
    runner.model.fault[3] = fault
    before = averages_before(runner, 3)
    assert place in train(runner)
    saved = torch.load(tmp_path / 'nan_iter_3_rank0.pth', weights_only=True)
    assert before['num_batches_tracked'] == 3
    for name, value in before.items():
        assert torch.equal(saved['state_dict'][f'norm.{name}'], value), name
        assert torch.equal(runner.model.state_dict()[f'norm.{name}'], value), name


def test_a_bad_running_average_is_named(tmp_path):
    runner = make_runner(tmp_path, hooks=[GUARD], norm=True)
    runner.model.norm.running_var.fill_(float('nan'))
    runner.model.fault[0] = lambda x: x * float('nan')
    assert 'buffer norm.running_var was already bad before this iteration, 8 NaN' in train(runner)


def test_a_bad_parameter_is_named(tmp_path):
    runner = make_runner(tmp_path, hooks=[GUARD])
    runner.model.last.bias.data.fill_(float('inf'))
    assert 'parameter last.bias was already bad before this iteration, 0 NaN and 1 infinite' in train(runner)


def test_a_bad_gradient_of_a_good_loss_stops_before_the_step(tmp_path):
    runner = make_runner(tmp_path, hooks=[GUARD])
    runner.model.fault[2] = lambda x: x + 0 * (x * 0).abs().sqrt()  # sqrt has an infinite slope at zero: 0 * inf
    message = train(runner)
    assert 'gradients of 2 parameters are not finite' in message and 'first.' in message
    assert 'that of the output of dropout' in message
    assert all(p.isfinite().all() for p in runner.model.parameters())


@pytest.mark.parametrize(
    'error, reason',
    [
        (OSError(28, 'No space left on device'), 'No space left on device'),
        (RuntimeError('[enforce fail] file write failed\nframe 0'), '[enforce fail] file write failed'),
    ],
    ids=['python', 'torch'],
)
def test_a_full_disk_does_not_hide_the_place(tmp_path, monkeypatch, error, reason):
    runner = make_runner(tmp_path, epochs=1, hooks=[GUARD])
    runner.model.fault[1] = lambda x: x + 1000

    def half(content, path):
        with open(path, 'wb') as file:
            file.write(b'PK')
        raise error

    monkeypatch.setattr(torch, 'save', half)
    message = train(runner)
    assert 'iteration 1: loss of the model is not finite: it arises in exponential' in message
    path = tmp_path / 'nan_iter_1_rank0.pth'
    assert message.endswith(f'random state and weights could not be saved in {path} ({reason})')
    assert not list(tmp_path.glob('nan_*'))


def test_gradients_need_not_be_checked(tmp_path):
    runner = make_runner(tmp_path, epochs=1, hooks=[dict(GUARD, check_gradients=False)])
    runner.model.fault[1] = lambda x: x + 0 * (x * 0).abs().sqrt()
    runner.train()
    assert not runner.model.first.weight.isfinite().all()


def test_bad_argument():
    with pytest.raises(TypeError, match='check_gradients is 1, expected True or False'):
        NaNGuardHook(check_gradients=1)


def test_between_looks_it_costs_nothing(tmp_path):
    """The fault of iteration 1 is in the weights when iteration 2 is looked at; copies are made there only."""
    runner = make_runner(tmp_path, hooks=[dict(GUARD, interval=3)])
    guard = next(hook for hook in runner.hooks if isinstance(hook, NaNGuardHook))
    calls = []
    runner.model.first.register_forward_hook(lambda *_: calls.append(bool(guard._call)))
    runner.model.fault[1] = lambda x: x + 1000
    message = train(runner)
    assert 'iteration 2' in message and 'was already bad before this iteration' in message
    assert calls[:3] == [False, False, True]


def test_a_compiled_module_is_looked_into(tmp_path):
    hook = dict(type='mmvmamba.CompileHook', modules=('exponential',), backend='eager')
    runner = make_runner(tmp_path, hooks=[GUARD, hook])
    runner.model.fault[2] = lambda x: x + 1000
    assert 'arises in exponential (Exponential)' in train(runner)


def test_a_step_that_a_fused_optimizer_skips_is_no_error(tmp_path):
    runner = make_runner(tmp_path, hooks=[GUARD])
    runner.optim_wrapper.update(type='mmvmamba.FastOptimWrapper', dtype='bfloat16', loss_scale=dict(init_scale=3e38))
    runner.optim_wrapper['optimizer']['fused'] = True
    runner.train()
    assert runner.iter == 4 and runner.optim_wrapper.loss_scaler.get_scale() < 3e38


def test_wrong_intervals_are_named():
    with pytest.raises(ValueError, match='interval is 0, expected at least 1'):
        NaNGuardHook(interval=0)
    with pytest.raises(TypeError, match="interval is '3', expected an integer"):
        NaNGuardHook(interval='3')
