"""Several processes on CPU, and one on the GPU, compute what one does; one that dies ends the run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from tests.test_tools.conftest import ROOT, run, user_folder  # noqa: F401  (fixtures)
from tests.test_tools.test_launch import DEMO
from tests.test_tools.test_train_test import QUICK, metrics

PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'PYTHONPATH': PATHS}


def train(out, *arguments, launcher=(), module='distributed'):
    command = [sys.executable, *launcher, '-m', f'tests.test_training.{module}', str(out), *arguments]
    return subprocess.run(command, cwd=out.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)


def assert_same(first, second, limits):
    """Losses and gradients agree to the rounding of their sums, relative for each dtype."""
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    assert two.keys() == limits.keys() <= one.keys()
    for name, limit in limits.items():
        assert len(one[name]) == len(two[name]) == 3
        for (loss, gradients), (other_loss, other_gradients) in zip(one[name], two[name]):
            assert (loss - other_loss).abs() <= limit * loss.abs()
            for key, gradient in gradients.items():
                assert (gradient - other_gradients[key]).norm() <= limit * gradient.norm(), (name, key)


@pytest.mark.parametrize(
    'processes, batches', [(2, '2+2,3+1,2+0'), pytest.param(4, '1+1+1+1,2+1+1+1,1+0+2+0', marks=pytest.mark.slow)]
)
def test_several_processes_compute_what_one_does(tmp_path, processes, batches):
    """Also with uneven batches, and with nothing in the last batch of one process."""
    result = train(tmp_path / 'out', batches, str(processes))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same(tmp_path / 'out.1', tmp_path / f'out.{processes}', dict(float64=1e-13, float32=5e-6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU is visible to torch')
def test_a_process_with_a_gpu_computes_what_one_on_the_cpu_does(tmp_path):
    result = train(tmp_path / 'out', '2+2,3+1,2+0', 'cuda')
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same(tmp_path / 'out.1', tmp_path / 'out.cuda', dict(float32=1e-5))


@pytest.mark.slow
def test_a_detector_with_nothing_to_find_on_one_rank(user_folder):  # noqa: F811
    """The step of two processes is the mean of both ones' steps, and their evaluation is that of one, exactly."""
    result = train(user_folder / 'detector', module='detector')
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (torch.load(user_folder / f'detector.{world}', weights_only=True) for world in (1, 2))
    assert one['metrics'] == two['metrics'] and 0 < one['metrics']['coco/bbox_mAP'] < 1
    for name, gradient in one['gradients'].items():
        assert (gradient - two['gradients'][name]).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run(tmp_path):
    """The others wait for its gradients: the run must end within a minute of the death, and say who died how."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    result = train(tmp_path / 'out', '1+1,1+1,1+1', 'die', launcher=launcher)
    assert time.time() - float((tmp_path / 'out.died').read_text()) < 60
    assert result.returncode != 0 and not (tmp_path / 'out').exists()
    assert re.search(r'exitcode\s*: 7', result.stderr), result.stderr[-3000:]


PIDS = """
import os
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WriteProcess(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            with open(f'process{get_rank()}.part', 'w') as file:
                file.write(str(os.getpid()))
            os.rename(f'process{get_rank()}.part', f'process{get_rank()}')
"""


def wait_for(condition, seconds):
    """Wait until a condition holds; returns whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_kill_9_of_one_process_ends_a_training(user_folder, rank):  # noqa: F811
    """As the system does when memory runs out. The training would go on for days."""
    folder = user_folder / f'killed{rank}'
    folder.mkdir()
    (folder / 'data').symlink_to(user_folder / 'data')
    (folder / 'write_process.py').write_text(PIDS)
    (folder / 'long.py').write_text(
        f"_base_ = ['{ROOT / DEMO['mmseg']}']\n"
        "custom_imports = dict(imports=['write_process'])\n"
        "custom_hooks = [dict(type='WriteProcess')]\n"
        'train_cfg = dict(max_iters=1000000, val_interval=1000000)\n'
        'param_scheduler = None\n'
    )
    command = ['bash', f'{ROOT}/tools/dist_train.sh', 'long.py', '2', '--work-dir', 'work', *QUICK]
    environment = {**ENVIRONMENT, 'PYTHON': sys.executable, 'PORT': str(29641 + rank)}
    environment['PYTHONPATH'] = os.pathsep.join([str(folder), PATHS])
    with open(folder / 'output.txt', 'w') as output:
        launcher = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            trains = lambda: all((folder / f'process{i}').exists() for i in (0, 1))  # noqa: E731
            assert wait_for(lambda: trains() or launcher.poll() is not None, 300) and launcher.poll() is None
            processes = [int((folder / f'process{i}').read_text()) for i in (0, 1)]
            start = time.monotonic()
            os.kill(processes[rank], signal.SIGKILL)
            assert launcher.wait(60) != 0 and time.monotonic() - start < 60
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
    text = (folder / 'output.txt').read_text()
    failure = rf'rank\s*: {rank} \(local_rank: {rank}\)\s+exitcode\s*: -9 \(pid: {processes[rank]}\)'
    assert re.search(failure, text), text[-4000:]
    # nor is the other process left behind
    assert wait_for(lambda: not Path(f'/proc/{processes[1 - rank]}').exists(), 10)


@pytest.mark.slow
def test_evaluation_by_two_processes_is_that_of_one(run, user_folder):  # noqa: F811
    """The same metrics exactly; 19 images of 360 are left for a last, smaller batch."""
    config = ROOT / DEMO['mmpretrain']
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict(), meta={}), user_folder / 'random.pth')
    environment = dict(PYTHON=sys.executable, PORT='29631')
    options = ['--cfg-options', 'test_dataloader.batch_size=31', 'test_dataloader.num_workers=0']
    options += ['test_dataloader.persistent_workers=False']
    run(f'python {ROOT}/tools/test.py {config} random.pth --work-dir one', *options)
    run(f'bash {ROOT}/tools/dist_test.sh {config} random.pth 2 --work-dir two', *options, **environment)
    assert metrics(user_folder / 'one') == {**metrics(user_folder / 'two'), **times(metrics(user_folder / 'one'))}


def times(values):
    """What the log says of speed, which differs."""
    return {name: value for name, value in values.items() if 'time' in name}
