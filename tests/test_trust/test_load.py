"""Threads, forked and spawned workers around the CPU op, and a short soak."""

import json
import subprocess
import sys
import threading

import pytest
import torch

from mmvmamba.models import VSSMBackbone
from mmvmamba.ops import use_backend
from tests.background import ENVIRONMENT, in_background
from tests.test_tools.conftest import ROOT, load_tool

ARCH = dict(dims=8, depths=(1, 1))


def images(seed):
    return torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(seed))


def test_threads_on_one_model_give_the_results_of_one():
    model = VSSMBackbone(ARCH, out_indices=(0, 1)).eval()
    with torch.inference_mode():
        expected = [model(images(seed)) for seed in range(8)]
    results, errors = {}, []

    def work(worker):
        try:
            with torch.inference_mode():
                for turn in range(12):
                    seed = (worker + turn) % 8
                    results[worker, turn] = (seed, model(images(seed)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and not any(thread.is_alive() for thread in threads) and len(results) == 72
    for seed, outs in results.values():
        assert all(torch.equal(first, second) for first, second in zip(outs, expected[seed]))


def test_a_backend_chosen_in_one_thread_stays_there():
    seen, ready, go = {}, threading.Barrier(2), threading.Barrier(2)
    from mmvmamba.ops.backend import resolve

    def work(name):
        with use_backend(name):
            ready.wait(30)
            seen[name] = resolve('selective_scan', 'cpu')
            go.wait(30)

    threads = [threading.Thread(target=work, args=(name,)) for name in ('cpu', 'naive')]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == dict(cpu='cpu', naive='naive') and resolve('selective_scan', 'cpu') == 'cpu'


@in_background
def test_data_loader_workers_do_not_deadlock():
    """Forked ones twice and spawned ones; here as in a training run, the parent has used the op before."""
    result = subprocess.run(
        [sys.executable, '-m', 'tests.test_trust.scanned'],
        cwd=ROOT,
        env={**ENVIRONMENT, 'OMP_NUM_THREADS': '2', 'PYTHONWARNINGS': 'ignore'},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line for line in result.stdout.splitlines() if 'done' in line] == ['fork done', 'fork done', 'spawn done']


def test_soak_finds_a_leak_and_a_changed_answer(monkeypatch, capsys, tmp_path):
    soak, held = load_tool('soak.py'), []

    class Leaking:
        def turn(self, chance):
            held.append(b'1' * 2**20)

        def answer(self):
            return torch.tensor(len(held) > 150)

    monkeypatch.setattr(soak, 'make_subjects', lambda device: dict(leaking=Leaking()))
    assert soak.main(['--minutes', '0.000001', '--report', str(tmp_path / 'soak.json')]) == 1
    report, text = json.loads((tmp_path / 'soak.json').read_text()), capsys.readouterr().err
    assert (report['iterations'], report['warm_up_turns'], report['errors']) == (200, 100, 5)
    assert 'turn 160, leaking: ArithmeticError: leaking answers its question in another way' in text
    assert 'memory grew' in text and 90 < report['end']['resident'] - report['after_warm_up']['resident'] < 150


@pytest.mark.slow
def test_short_soak(tmp_path):
    report = tmp_path / 'soak.json'
    command = [sys.executable, str(ROOT / 'tools/soak.py'), '--minutes', '1.5', '--report', str(report)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    content = json.loads(report.read_text())
    assert content['errors'] == 0 and len(content['turns']) == 7 and min(content['turns'].values()) > 5
    # memory was read after the warm-up, and long before the end
    assert 100 <= content['warm_up_turns'] <= content['iterations'] - 50
    assert content['after_warm_up']['resident'] > 0
