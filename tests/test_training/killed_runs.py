"""Train the demo classifier whole and with kills, and compare: ``killed_runs.py FOLDER EPOCHS KILL [KILL ...]``.

FOLDER holds the digits data set. A KILL is the moment at which ``kill -9`` comes: a number is the part of the time
that the whole run took, from 0 to 1, and ``writing``, ``rename``, ``pointer`` and ``removal`` are moments of saving.
Each killed run is resumed with the next one; the last goes through. One that ends before its kill is compared, and the
next begins anew. A process of its own, since runs are forked after the slow imports.
"""

import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import mmpretrain  # noqa: F401
import torch
from mmengine.fileio import LocalBackend

import mmvmamba.training.hooks.atomic_checkpoint as saving
from mmvmamba.checkpoint import find_damage
from tests.test_tools.conftest import ROOT, load_tool

CONFIG = ROOT / 'configs/demo/vmamba-nano_1xb64_digits-32px.py'
SMALL = f"""
_base_ = ['{CONFIG}']
train_dataloader = dict(batch_size=120, dataset=dict(data_prefix='val'))
train_cfg = dict(val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1))
param_scheduler = [dict(type='LinearLR', start_factor=0.04, end=2, convert_to_iter_based=True)]
custom_hooks = [dict(type='mmvmamba.ExactResumeHook')]
randomness = dict(deterministic=True)
"""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Let this process be killed at a moment of saving the second epoch that it trains."""
    put, commit, write_whole, seen = LocalBackend.put, saving.commit, saving.write_whole, {}

    def second(moment, path):
        name = Path(path).name
        if name.startswith('epoch_'):  # and not the best
            seen.setdefault(moment, set()).add(name)
        return len(seen.get(moment, ())) == 2

    def half(self, content, path):
        if second('writing', path):
            Path(path).write_bytes(content[: len(content) // 2])
            die()
        put(self, content, path)

    def before(call, path_of):
        return lambda *arguments: die() if second(moment, path_of(*arguments)) else call(*arguments)

    if moment == 'writing':
        LocalBackend.put = half
    elif moment == 'rename':
        saving.commit = before(commit, lambda part, final: final)
    elif moment == 'pointer':
        saving.write_whole = before(write_whole, lambda pointer, path: path.decode())
    elif moment == 'removal':
        hook = saving.AtomicCheckpointHook
        hook._remove = before(hook._remove, lambda self, path: path)
    else:
        raise ValueError(f'moment is {moment!r}, expected writing, rename, pointer, removal or a number')


def train(folder: Path, work: str, epochs: int, kill: str = '', duration: float = 0.0) -> int:
    """Train in a forked process; returns its exit status, -9 if it was killed. A whole run takes ``duration``."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        log = os.open(f'{work}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill and not re.fullmatch(r'[\d.]+', kill):
            die_at(kill)
        Path(f'{work}.py').write_text(SMALL)
        arguments = [f'{work}.py', '--work-dir', work, '--resume', '--cfg-options', f'train_cfg.max_epochs={epochs}']
        status = 1
        try:
            status = load_tool('train.py').main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if re.fullmatch(r'[\d.]+', kill):
        end = time.monotonic() + float(kill) * duration
        while time.monotonic() < end and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def compare(first: Path, second: Path, epochs: int) -> None:
    """Bit for bit: weights, optimizer, metrics."""
    one, two = (torch.load(path / f'epoch_{epochs}.pth', weights_only=True) for path in (first, second))
    for name, value in one['state_dict'].items():
        assert torch.equal(value, two['state_dict'][name]), name
    for state, other in zip(one['optimizer']['state'].values(), two['optimizer']['state'].values()):
        assert all(torch.equal(state[key], other[key]) for key in state)
    info, other = (content['message_hub']['runtime_info'] for content in (one, two))
    assert info['best_score'] == other['best_score']


def newest(folder: Path) -> int:
    """The number of epochs in the newest checkpoint of a folder, 0 without one."""
    return max((int(path.stem.rpartition('_')[2]) for path in folder.glob('epoch_*.pth')), default=0)


def starts(log: Path) -> list:
    """The epochs that the runs in a log had resumed from."""
    return [int(epoch) for epoch in re.findall(r'resumed epoch: (\d+)', log.read_text())] if log.exists() else []


def main(folder: str, epochs: str, *kills: str) -> None:
    folder, epochs, killed, resumed = Path(folder), int(epochs), 0, 0
    start = time.monotonic()
    status = train(folder, 'whole', epochs)
    duration = time.monotonic() - start
    assert status == 0, (folder / 'whole.log').read_text()[-3000:]
    for kill in kills:
        resumed += any((folder / 'killed').glob('*.pth'))
        start, last, log = time.monotonic(), newest(folder / 'killed'), folder / 'killed.log'
        before = starts(log)
        status = train(folder, 'killed', epochs, kill, duration)
        assert status in (0, -9), log.read_text()[-3000:]
        assert starts(log)[len(before) :] in ([], [last]), f'{starts(log)}: the last is not of epoch {last}'
        killed += status == -9
        for path in (folder / 'killed').glob('*.pth'):
            assert not find_damage(str(path)), path  # a file with a checkpoint's name is whole
        if status == 0:
            compare(folder / 'whole', folder / 'killed', epochs)
            shutil.rmtree(folder / 'killed')
            duration = min(duration, time.monotonic() - start)  # other programs may have slowed the first one down
    status = train(folder, 'killed', epochs)
    assert status == 0, (folder / 'killed.log').read_text()[-3000:]
    compare(folder / 'whole', folder / 'killed', epochs)
    print(f'{killed} of {len(kills)} runs were killed, {resumed} had resumed; the last one ended with the same bits')


if __name__ == '__main__':
    main(*sys.argv[1:])
