"""Checkpoints are whole or not there, whatever stops the run; resuming finds the last whole one."""

import importlib
import os
import resource
import shutil
import struct
import zipfile

import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import init_default_scope

from mmvmamba.checkpoint import CheckpointError, find_damage
from mmvmamba.training.hooks import AtomicCheckpointHook, ExactResumeHook, NaNGuardHook

from .toy import make_runner


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, and nothing is cleaned up."""


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_hooks_resolve_in_all_scopes(scope):
    hooks = importlib.import_module(f'{scope}.registry').HOOKS
    init_default_scope(scope)
    for cls in (AtomicCheckpointHook, ExactResumeHook, NaNGuardHook):
        assert type(hooks.build(dict(type=f'mmvmamba.{cls.__name__}'))) is cls
        assert type(hooks.build(dict(type=cls.__name__))) is cls


def names(folder):
    return sorted(path.name for path in folder.glob('*') if path.is_file() and not path.name.startswith('20'))


def test_same_files_as_the_hook_it_replaces(tmp_path):
    options, scores = dict(max_keep_ckpts=2, save_best='score', rule='greater'), [0.1, 0.3, 0.2]
    make_runner(tmp_path / 'ours', 3, checkpoint=options, scores=scores).train()
    theirs = make_runner(tmp_path / 'theirs', 3, checkpoint=options, scores=scores)
    for hook in [hook for hook in theirs.hooks if isinstance(hook, CheckpointHook)]:
        hook.__class__ = CheckpointHook
    theirs.train()
    assert names(tmp_path / 'ours') == names(tmp_path / 'theirs')
    assert names(tmp_path / 'ours') == ['best_score_epoch_2.pth', 'epoch_2.pth', 'epoch_3.pth', 'last_checkpoint']
    for name in ('best_score_epoch_2.pth', 'epoch_3.pth'):
        first, second = (torch.load(tmp_path / run / name) for run in ('ours', 'theirs'))
        assert first['message_hub'].keys() == second['message_hub'].keys() and first.keys() == second.keys()
        info = [content['message_hub']['runtime_info'] for content in (first, second)]
        assert info[0]['keep_ckpt_ids'] == info[1]['keep_ckpt_ids'] and info[0]['best_score'] == info[1]['best_score']


@pytest.mark.parametrize(
    'moment, iteration, steps',
    [
        ('while writing', 2, 4),
        ('before the rename', 2, 4),
        ('before last_checkpoint', 2, 4),
        ('while writing', 4, 4),
        ('before the rename', 4, 4),
        ('before last_checkpoint', 4, 2),
        ('before the removal', 4, 2),
    ],
)
def test_killed_while_saving(tmp_path, monkeypatch, moment, iteration, steps):
    """With one checkpoint kept, as the demo has it: at no moment is there none, and all whole work is gone on from.

    After iteration 2, of 6, the best model and then the first epoch (again) are saved, after iteration 4 the second.
    """
    import mmvmamba.training.hooks.atomic_checkpoint as module

    options = dict(max_keep_ckpts=1, save_best='score', rule='greater')
    runner = make_runner(tmp_path, 3, checkpoint=options, scores=[0.1, 0.2, 0.3])
    put, rename, point, remove = LocalBackend.put, module.commit, module.write_whole, AtomicCheckpointHook._remove

    def at(moment_here, call):
        def wrapped(*arguments):
            if moment == moment_here and (runner.epoch, runner.iter) == (1, iteration):
                if moment == 'while writing':
                    _, content, path = arguments
                    with open(path, 'wb') as file:
                        file.write(content[: len(content) // 2])
                raise Killed
            return call(*arguments)

        return wrapped

    monkeypatch.setattr(LocalBackend, 'put', at('while writing', put))
    monkeypatch.setattr(module, 'commit', at('before the rename', rename))
    monkeypatch.setattr(module, 'write_whole', at('before last_checkpoint', point))
    monkeypatch.setattr(AtomicCheckpointHook, '_remove', at('before the removal', remove))
    with pytest.raises(Killed):
        runner.train()
    monkeypatch.undo()
    files = [name for name in names(tmp_path) if name.endswith('.pth')]
    assert files and not any(find_damage(str(tmp_path / name)) for name in files)

    resumed = make_runner(tmp_path, 3, checkpoint=options, scores=[0.1, 0.2, 0.3], resume=True)
    resumed.train()
    assert resumed.epoch == 3 and resumed.model.calls == steps
    assert 'epoch_3.pth' in names(tmp_path) and not list(tmp_path.glob('*.part'))


def note_validations(runner):
    """A list that grows by the epoch at each validation."""
    epochs, evaluate = [], runner.val_loop.evaluator.evaluate
    runner.val_loop.evaluator.evaluate = lambda size: epochs.append(runner.epoch) or evaluate(size)
    return epochs


@pytest.mark.parametrize('moment', ['while validating', 'while saving the best', 'in the next epoch'])
def test_a_validation_that_a_kill_prevented_is_made_up_for(tmp_path, monkeypatch, moment):
    """mmengine saves before it validates: the file does not know the score of its own weights."""
    options, scores = dict(max_keep_ckpts=1, save_best='score', rule='greater'), [0.1, 0.9, 0.3]
    runner = make_runner(tmp_path, 3, checkpoint=options, scores=scores)
    places = {
        'while validating': (runner.val_loop.evaluator, 'evaluate'),
        'while saving the best': (LocalBackend, 'put'),
        'in the next epoch': (runner.model, 'train_step'),
    }
    place, name = places[moment]
    call = getattr(place, name)

    def wrapped(*arguments, **options):
        if runner.epoch == 2 and (moment != 'while saving the best' or 'best' in str(arguments[2])):
            raise Killed
        return call(*arguments, **options)

    monkeypatch.setattr(place, name, wrapped)
    with pytest.raises(Killed):
        runner.train()
    monkeypatch.undo()
    resumed = make_runner(tmp_path, 3, checkpoint=options, scores=scores, resume=True)
    asked = note_validations(resumed)
    resumed.train()
    assert resumed.message_hub.get_info('best_score') == 0.9 and resumed.model.calls == 2
    assert asked == ([3] if moment == 'in the next epoch' else [2, 3])  # a best score is saved at once
    assert names(tmp_path) == ['best_score_epoch_2.pth', 'epoch_3.pth', 'last_checkpoint']


def test_the_last_validation_is_made_up_for(tmp_path, monkeypatch):
    """The file then knows of it as if nothing had happened."""
    options, scores = dict(max_keep_ckpts=1, save_best='score', rule='greater'), [0.1, 0.9]
    runner = make_runner(tmp_path, 2, checkpoint=options, scores=scores)
    evaluate = runner.val_loop.evaluator.evaluate

    def killed(size):
        if runner.epoch == 2:
            raise Killed
        return evaluate(size)

    monkeypatch.setattr(runner.val_loop.evaluator, 'evaluate', killed)
    with pytest.raises(Killed):
        runner.train()
    make_runner(tmp_path, 2, checkpoint=options, scores=scores, resume=True).train()
    assert names(tmp_path) == ['best_score_epoch_2.pth', 'epoch_2.pth', 'last_checkpoint']
    info = torch.load(tmp_path / 'epoch_2.pth')['message_hub']['runtime_info']
    assert info['best_score'] == 0.9 and info['best_ckpt'].endswith('best_score_epoch_2.pth')
    again = make_runner(tmp_path, 2, checkpoint=options, scores=scores, resume=True)
    asked = note_validations(again)
    again.train()
    assert asked == [] and again.epoch == 2


def test_a_validation_is_made_up_for_by_iterations_too(tmp_path, monkeypatch):
    options = dict(by_epoch=False, max_keep_ckpts=1, save_best='score', rule='greater')
    runner = make_runner(tmp_path, 3, checkpoint=options, scores=[0.1, 0.9, 0.3], by_iter=True)
    evaluate = runner.val_loop.evaluator.evaluate

    def killed(size):
        if runner.iter == 2:
            raise Killed
        return evaluate(size)

    monkeypatch.setattr(runner.val_loop.evaluator, 'evaluate', killed)
    with pytest.raises(Killed):
        runner.train()
    make_runner(tmp_path, 3, checkpoint=options, scores=[0.1, 0.9, 0.3], by_iter=True, resume=True).train()
    assert names(tmp_path) == ['best_score_iter_2.pth', 'iter_3.pth', 'last_checkpoint']


def test_a_validation_that_was_not_due_is_not_made(tmp_path):
    options = dict(save_best='score', rule='greater')
    make_runner(tmp_path, 2, checkpoint=options, scores=[0.1, 0.2]).train()
    resumed = make_runner(tmp_path, 3, checkpoint=options, scores=[0.1, 0.2, 0.3], resume=True)
    resumed.train_loop.val_begin = 3
    asked = note_validations(resumed)
    resumed.train()
    assert asked == [3]


def cut(path):
    path.write_bytes(path.read_bytes()[:-500])


def flip(path):
    """Flip one bit of a weight: torch itself loads this without a word."""
    with zipfile.ZipFile(path) as archive:
        header = next(record.header_offset for record in archive.infolist() if record.filename.endswith('/data/0'))
    content = bytearray(path.read_bytes())
    content[header + 30 + sum(struct.unpack_from('<HH', content, header + 26))] ^= 16
    path.write_bytes(bytes(content))
    torch.load(path)


@pytest.mark.parametrize('damage', [cut, flip, lambda path: path.write_bytes(b'')], ids=['cut', 'flip', 'empty'])
def test_resuming_goes_back_to_the_newest_whole_checkpoint(tmp_path, damage):
    make_runner(tmp_path, 3).train()
    damage(tmp_path / 'epoch_3.pth')
    runner = make_runner(tmp_path, 4, resume=True)
    runner.train()
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_4.pth')
    assert runner._resume and not find_damage(str(tmp_path / 'epoch_3.pth'))  # written anew on the way


@pytest.mark.parametrize('pointer', [None, '', '/nowhere/epoch_9.pth'], ids=['none', 'empty', 'stale'])
def test_a_lost_pointer_is_found_again(tmp_path, pointer):
    make_runner(tmp_path, 2).train()
    path = tmp_path / 'last_checkpoint'
    path.unlink() if pointer is None else path.write_text(pointer)
    runner = make_runner(tmp_path, 3, resume=True)
    runner.train()
    assert runner.iter == 6 and runner.model.calls == 2


def steps_after_resuming(folder, epochs=12, **options):
    """How many steps of a run of 12 epochs, 2 steps each, are still to be done."""
    runner = make_runner(folder, epochs, resume=True, **options)
    runner.train()
    return runner.model.calls


def test_a_kill_before_the_pointer_is_written_loses_nothing(tmp_path):
    """By number and not by name: epoch 10 comes after epoch 9."""
    make_runner(tmp_path, 10).train()
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_9.pth'))
    assert steps_after_resuming(tmp_path) == 4


def test_a_newer_file_that_is_damaged_is_passed_over(tmp_path):
    make_runner(tmp_path, 10).train()
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_9.pth'))
    flip(tmp_path / 'epoch_10.pth')
    assert steps_after_resuming(tmp_path) == 6


def test_a_kill_before_the_pointer_is_written_elsewhere(tmp_path):
    """Checkpoints may be kept in another folder than logs."""
    checkpoint = dict(out_dir=str(tmp_path / 'files'), filename_tmpl='at_{:04d}.pth')
    make_runner(tmp_path / 'run', 3, checkpoint=checkpoint).train()
    assert names(tmp_path / 'files/run') == ['at_0001.pth', 'at_0002.pth', 'at_0003.pth']
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / 'files/run/at_0002.pth'))
    assert steps_after_resuming(tmp_path / 'run', 4, checkpoint=checkpoint) == 2


@pytest.mark.parametrize('place', ['other/epoch_2.pth', 'run/chosen.pth', 'run/best_score_epoch_2.pth'])
def test_a_pointer_to_another_file_is_followed(tmp_path, place):
    make_runner(tmp_path / 'run', 3).train()
    (tmp_path / 'other').mkdir()
    shutil.copy(tmp_path / 'run/epoch_2.pth', tmp_path / place)
    (tmp_path / 'run/last_checkpoint').write_text(str(tmp_path / place))
    assert steps_after_resuming(tmp_path / 'run', 4) == 4


def test_files_of_an_earlier_run_are_not_taken_for_newer(tmp_path):
    """A run that begins anew in the same folder leaves them there until it comes to their number."""
    make_runner(tmp_path, 8).train()
    make_runner(tmp_path, 2).train()
    assert 'epoch_8.pth' in names(tmp_path)
    assert steps_after_resuming(tmp_path, 4) == 4
    flip(tmp_path / 'epoch_4.pth')
    assert steps_after_resuming(tmp_path, 4) == 2


@pytest.mark.parametrize('pointer', [True, False])
def test_a_copy_of_the_folder_goes_on_from_the_highest_number(tmp_path, pointer):
    """A copy may give its files any time of change."""
    make_runner(tmp_path, 3).train()
    for age, name in enumerate(['epoch_3.pth', 'epoch_1.pth', 'epoch_2.pth']):
        os.utime(tmp_path / name, (1e9 + age, 1e9 + age))
    if not pointer:
        (tmp_path / 'last_checkpoint').unlink()
    assert steps_after_resuming(tmp_path, 4) == 2


def test_no_whole_checkpoint_stops_the_run(tmp_path):
    make_runner(tmp_path, 1).train()
    flip(tmp_path / 'epoch_1.pth')
    with pytest.raises(CheckpointError, match=r'no whole checkpoint to resume from .*epoch_1.pth .*checksum'):
        make_runner(tmp_path, 2, resume=True).train()


def test_a_damaged_file_by_name_is_refused(tmp_path):
    make_runner(tmp_path, 1).train()
    cut(tmp_path / 'epoch_1.pth')
    with pytest.raises(CheckpointError, match=r'epoch_1.pth. is damaged \(it is truncated'):
        make_runner(tmp_path, 2, resume=True, load_from=tmp_path / 'epoch_1.pth').train()


def test_nothing_to_resume_from_starts_at_the_beginning(tmp_path):
    runner = make_runner(tmp_path, 1, resume=True)
    runner.train()
    assert runner.model.calls == 2


def test_full_disk(tmp_path):
    """The system refuses to write on after some bytes; what was there before stays, and the message says so."""
    make_runner(tmp_path, 1).train()
    before = (tmp_path / 'epoch_1.pth').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    runner = make_runner(tmp_path, 2, resume=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r'epoch_2.pth cannot be written \(File too large\); earlier .* as they were'):
            runner.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / 'epoch_1.pth').read_bytes() == before
    assert names(tmp_path) == ['epoch_1.pth', 'last_checkpoint']


def test_code_in_a_checkpoint_is_not_run_on_resuming(tmp_path):
    make_runner(tmp_path, 1).train()
    path, trace = tmp_path / 'epoch_1.pth', tmp_path / 'trace'
    content = torch.load(path)
    content['meta']['config'] = f"open({str(trace)!r}, 'w')\n"
    torch.save(content, path)
    runner = make_runner(tmp_path, 2, resume=True)
    runner.train()
    assert runner.epoch == 2 and not trace.exists()


def test_mmengine_would_run_it(tmp_path):
    """Keeps the test above honest: without the hook the code is run."""
    make_runner(tmp_path, 1).train()
    path, trace = tmp_path / 'epoch_1.pth', tmp_path / 'trace'
    content = torch.load(path)
    content['meta']['config'] = f"open({str(trace)!r}, 'w')\n"
    torch.save(content, path)
    runner = make_runner(tmp_path, 2, resume=True)
    runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, AtomicCheckpointHook)]
    runner.train()
    assert trace.exists()


@pytest.mark.parametrize('stops', [[1], [2], [1, 2, 3]], ids=str)
def test_resumed_runs_end_with_the_same_bits(tmp_path, stops):
    hooks = [dict(type='mmvmamba.ExactResumeHook')]
    whole = make_runner(tmp_path / 'whole', 4, hooks)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    for epochs in [*stops, 4]:
        part = make_runner(tmp_path / 'parts', epochs, hooks, resume=True)
        part.model.load_state_dict(start)
        torch.rand(epochs)  # some other history of random numbers
        part.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name
    first, second = (torch.load(tmp_path / run / 'epoch_4.pth')['optimizer'] for run in ('whole', 'parts'))
    assert all(torch.equal(first['state'][i]['exp_avg'], second['state'][i]['exp_avg']) for i in first['state'])


def test_exact_resuming_by_iterations_wants_workers(tmp_path):
    with pytest.raises(ValueError, match='num_workers is 0, expected at least 1'):
        make_runner(tmp_path, 2, [dict(type='mmvmamba.ExactResumeHook')], by_iter=True).train()


@pytest.mark.parametrize(
    'deterministic, given, expected', [(True, None, ':4096:8'), (True, ':16:8', ':16:8'), (False, None, None)]
)
def test_cublas_gets_the_workspace_that_deterministic_runs_need(tmp_path, monkeypatch, deterministic, given, expected):
    name = 'CUBLAS_WORKSPACE_CONFIG'
    monkeypatch.setenv(name, given or '')
    if given is None:
        monkeypatch.delenv(name)
    torch.use_deterministic_algorithms(deterministic)
    make_runner(tmp_path, 1, [dict(type='mmvmamba.ExactResumeHook')]).train()
    assert os.environ.get(name) == expected


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / 'epoch_7.pth.part').write_bytes(b'half')
    make_runner(tmp_path, 1).train()
    assert names(tmp_path) == ['epoch_1.pth', 'last_checkpoint']
