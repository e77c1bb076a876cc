"""Threads, forked and spawned workers around the CPU op, and a short soak."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mmvmamba.models import VSSMBackbone
from mmvmamba.ops import selective_scan, use_backend
from tests.test_tools.conftest import ROOT

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


class Scanned(Dataset):
    """A data set that runs the op, as one that extracts features would."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        u = torch.full((1, 8, 200), float(index + 1))
        ones = torch.ones(1, 1, 1, 200)
        return selective_scan(u, u, -torch.ones(8, 1), ones, ones)


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_data_loader_workers_do_not_deadlock(start, tmp_path):
    """Also after the parent ran the op with several threads, which forked OpenMP does not survive by itself."""
    code = (
        'import torch\n'
        'from torch.utils.data import DataLoader\n'
        'from tests.test_trust.test_load import Scanned\n'
        'if __name__ == "__main__":\n'
        '    torch.set_num_threads(2)\n'
        '    expected = [Scanned()[i] for i in range(6)]\n'
        f'    loader = DataLoader(Scanned(), batch_size=None, num_workers=2, multiprocessing_context={start!r})\n'
        '    for _ in range(2):\n'
        '        assert all(torch.equal(a, b) for a, b in zip(loader, expected))\n'
        '    print("done")\n'
    )
    script = tmp_path / 'workers.py'
    script.write_text(code)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '2', 'PYTHONWARNINGS': 'ignore'}
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0 and 'done' in result.stdout, result.stderr[-3000:]


def test_workers_in_this_process_too():
    loader = DataLoader(Scanned(), batch_size=None, num_workers=0)
    assert len(list(loader)) == 6


@pytest.mark.slow
def test_short_soak(tmp_path):
    report = tmp_path / 'soak.json'
    command = [sys.executable, str(ROOT / 'tools/soak.py'), '--minutes', '1.5', '--report', str(report)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    content = json.loads(report.read_text())
    assert content['errors'] == 0 and content['iterations'] > 10
