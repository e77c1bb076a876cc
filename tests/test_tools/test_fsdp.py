"""Fully sharded training by two processes on CPU: what decays, resuming, and use of the checkpoint elsewhere."""

import sys

import pytest
import torch

from mmvmamba.checkpoint import read_checkpoint

from .conftest import ROOT
from .test_train_test import metrics

FSDP, PLAIN = (ROOT / f'configs/classification/vmamba-base-s1l20_8xb128{kind}_in1k.py' for kind in ('-fsdp', ''))
SMALL = """
_base_ = '{config}'
model = dict(
    backbone=dict(arch='nano', drop_path_rate=0.0), head=dict(in_channels=256), train_cfg=dict(augments=None)
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',  # mixed precision needs a GPU
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg={{{{_base_.optim_wrapper.paramwise_cfg}}}},
)
dataset = dict(_delete_=True, type='SyntheticImages')
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4)]
custom_imports = dict(imports=['synthetic_images'])
custom_hooks = []
randomness = dict(seed=0)
"""
IMAGES = """
import torch
from mmpretrain.registry import DATASETS
from mmpretrain.structures import DataSample


@DATASETS.register_module()
class SyntheticImages(torch.utils.data.Dataset):
    metainfo = dict(classes=[str(i) for i in range(1000)])

    def __len__(self):
        return 16

    def __getitem__(self, i):
        noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        return dict(inputs=noise, data_samples=DataSample().set_gt_label(i % 7))
"""


def weights(folder):
    return read_checkpoint(str(folder / 'epoch_2.pth'))


@pytest.mark.slow
def test_sharded_training(run, user_folder):
    (user_folder / 'synthetic_images.py').write_text(IMAGES)
    (user_folder / 'sharded.py').write_text(SMALL.format(config=FSDP))
    (user_folder / 'plain.py').write_text(SMALL.format(config=PLAIN))
    environment = dict(PYTHON=sys.executable, PYTHONPATH=str(user_folder), PORT='29653')
    train = f'bash {ROOT}/tools/dist_train.sh sharded.py 2 --work-dir'

    run(f'{train} through', **environment)
    run(f'{train} stopped', '--cfg-options', 'train_cfg.max_epochs=1', **environment)
    assert 'resumed epoch: 1, iter: 2' in run(f'{train} stopped --resume', **environment)
    through, stopped = (weights(user_folder / name) for name in ('through', 'stopped'))
    assert through['state_dict'].keys() == stopped['state_dict'].keys()
    for name, value in through['state_dict'].items():
        assert torch.equal(value, stopped['state_dict'][name]), name

    # the published rule, which a shard's shape does not tell
    groups = through['optimizer']['param_groups']
    decayed = {name for group in groups if group['weight_decay'] > 0 for name in group['params']}
    tensors = through['state_dict'].items()
    assert decayed == {name for name, value in tensors if value.dim() > 1 and not name.endswith('.bias')}

    # unsharded, by one process: the same model
    test = f'python {ROOT}/tools/test.py plain.py through/epoch_2.pth --work-dir tested'
    run(test, PYTHONPATH=str(user_folder))
    log = next((user_folder / 'through').glob('2*/*.log')).read_text()
    top1 = metrics(user_folder / 'tested')['accuracy/top1']
    assert f'Epoch(val) [2][2/2]    accuracy/top1: {top1:.4f}' in log and top1 > 0
