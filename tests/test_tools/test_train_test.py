"""Training, testing and resuming from a folder outside the repository, as a user does."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmvmamba.checkpoint import read_checkpoint

from .conftest import ROOT, load_tool, place_of_its_own
from .test_launch import DEMO

QUICK = [
    '--cfg-options',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
    'train_dataloader.batch_size=4',
]
BY_EPOCH = [
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'param_scheduler=None',
    'default_hooks.checkpoint.interval=1',
]
BY_ITER = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'param_scheduler=None',
    'default_hooks.checkpoint.interval=2',
]
SMALL_CLASSES = ['train_dataloader.dataset.data_prefix=val', 'train_dataloader.batch_size=120']


def metrics(folder):
    newest = max(folder.glob('2*/2*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


def scalars(folder):
    """The last line of a training run's figures."""
    (path,) = folder.glob('2*/vis_data/scalars.json')
    return json.loads(path.read_text().splitlines()[-1])


def test_classification_through_mim():
    with place_of_its_own() as (folder, run):
        config, work = ROOT / DEMO['mmpretrain'], folder / 'classification'
        checkpoint, quick = work / 'epoch_1.pth', [*QUICK, *BY_EPOCH, *SMALL_CLASSES]
        train = f'python -m mim train mmpretrain {config} --gpus 0 --work-dir {work}'
        run(train, *quick)
        validated = scalars(work)['accuracy/top1']
        official = folder / 'official.pth'  # the published code's layout and names
        assert load_tool('model_converters/mm2vmamba.py').main([str(checkpoint), str(official)]) == 0
        test = f'python -m mim test mmpretrain {config} --checkpoint {official} --gpus 0 --work-dir {work}/test'
        text = run(test, *QUICK)
        assert 'selective_scan' in text or 'ss2d_scan' in text  # the log says which backend runs
        assert metrics(work / 'test')['accuracy/top1'] == validated
        test = f'python {ROOT}/tools/test.py {config} {checkpoint} --work-dir {work}/cost --tta --complexity'
        text = run(test, *QUICK, 'test_dataloader.batch_size=2')
        assert 'accuracy/top1' in text and re.search(r'parameters: 1,\d{3},\d{3}\n', text)
        assert re.search(r'FLOPs: 0\.\d\d G for an image of 224x224\n', text)
        assert re.search(r'throughput: [1-9][\d.]+ images/s of 224x224 on cpu, fp32, batches of 2\n', text)
        quick[quick.index('train_cfg.max_epochs=1')] = 'train_cfg.max_epochs=2'
        text = run(f'{train} --resume', *quick)
        assert 'resumed epoch: 1' in text and (work / 'epoch_2.pth').is_file()


def test_detection_through_the_tools():
    with place_of_its_own() as (folder, run):
        config, work = ROOT / DEMO['mmdet'], folder / 'detection'
        run(f'python {ROOT}/tools/train.py {config} --work-dir {work}', *QUICK, *BY_EPOCH)
        test = f'python {ROOT}/tools/test.py {config} {work}/epoch_1.pth --work-dir {work}/test'
        text = run(f'{test} --show-dir {work}/shown --out {work}/results.pkl', *QUICK)
        assert 'coco/segm_mAP' in text
        assert len(list((work / 'shown').rglob('*.png'))) == 4 and (work / 'results.pkl').stat().st_size > 0


def test_segmentation_by_the_name_of_a_shipped_config():
    with place_of_its_own() as (folder, run):
        name, work = DEMO['mmseg'].rpartition('/')[2], folder / 'segmentation'
        run(f'python -m mim train mmvmamba {name} --gpus 0 --work-dir {work}', *QUICK, *BY_ITER)
        test = f'python -m mim test mmvmamba {name} --checkpoint {work}/iter_2.pth --gpus 0 --work-dir {work}/test'
        assert 'mIoU' in run(f'{test} --tta', *QUICK) and 0 <= metrics(work / 'test')['mIoU'] <= 100


HOOK = '''
import hashlib
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WriteParameters(Hook):
    """Write a hash of every process's parameters, and which images it saw."""

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen += [sample.img_path for sample in data_batch['data_samples']]

    def after_train(self, runner):
        digest = hashlib.sha256()
        for value in runner.model.parameters():
            digest.update(value.detach().numpy().tobytes())
        with open(f'rank{get_rank()}of{get_world_size()}.txt', 'w') as file:
            file.write('\\n'.join([digest.hexdigest(), *self.seen]))
'''


def test_two_processes_keep_equal_parameters():
    with place_of_its_own() as (folder, run):
        (folder / 'write_parameters.py').write_text(HOOK)
        (folder / 'two.py').write_text(
            f"_base_ = ['{ROOT / DEMO['mmseg']}']\n"
            "custom_imports = dict(imports=['write_parameters'])\n"
            "custom_hooks = [dict(type='WriteParameters')]\n"
        )
        work, environment = folder / 'two', dict(PYTHON=sys.executable, PYTHONPATH=str(folder), PORT='29617')
        run(f'bash {ROOT}/tools/dist_train.sh two.py 2 --work-dir {work}', *QUICK, *BY_ITER, **environment)
        first, second = ((folder / f'rank{rank}of2.txt').read_text().splitlines() for rank in (0, 1))
        assert first[0] == second[0] and first[1:] and first[1:] != second[1:]
        test = f'bash {ROOT}/tools/dist_test.sh two.py {work}/iter_2.pth 2 --work-dir {work}/test'
        assert 'mIoU' in run(test, *QUICK, **environment)


@pytest.mark.slow
def test_two_machines(run, user_folder):
    """NNODES and NODE_RANK join what each machine starts: one learning rate by the images of both, one average."""
    (user_folder / 'machines.py').write_text(
        f"_base_ = ['{ROOT / DEMO['mmseg']}']\n"
        'optim_wrapper = dict(accumulative_counts=2)\n'
        "custom_hooks = [dict(type='EMAHook')]\n"
        'auto_scale_lr = dict(enable=False, base_batch_size=16)\n'
    )
    environment = dict(PYTHON=sys.executable, NNODES='2', MASTER_ADDR='127.0.0.1', PORT='29677')
    command = f'bash {ROOT}/tools/dist_train.sh machines.py 1 --work-dir machines --auto-scale-lr'
    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(lambda rank: run(command, *QUICK, *BY_ITER, NODE_RANK=rank, **environment), '01'))
    assert any('batch size of 16 and the current batch size is 8. Scaling the original LR by 0.5' in t for t in texts)
    state = read_checkpoint(str(user_folder / 'machines/iter_2.pth'))
    assert state['ema_state_dict'] and state['optimizer']['param_groups'][0]['lr'] == 5e-4
