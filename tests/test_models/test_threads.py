"""Threads around one model, and data-loader workers that fork and spawn."""

import os
import subprocess
import sys
import threading

import torch

from mmvmamba.models import VSSMBackbone
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


def test_data_loader_workers_do_not_deadlock():
    """Forked ones twice and spawned ones; here as in a training run, the parent has used the op before."""
    result = subprocess.run(
        [sys.executable, '-m', 'tests.test_ops.scanned'],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '2', 'PYTHONWARNINGS': 'ignore'},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line for line in result.stdout.splitlines() if 'done' in line] == ['fork done', 'fork done', 'spawn done']
