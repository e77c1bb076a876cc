"""The configs of the model zoo, and models of them with synthetic data."""

import copy
import functools
import importlib
import re
from pathlib import Path

import mmengine.config.config as config_module
import mmengine.config.utils as config_utils
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parents[2]
FOLDERS = dict(mmpretrain='classification', mmdet='detection', mmseg='segmentation')
TASKS = {folder: scope for scope, folder in FOLDERS.items()}
SIDE = 64
# to find an inherited config, mmengine parses a hundred metafiles and reloads pkg_resources, each time anew
config_utils.load = functools.cache(config_utils.load)
config_module.is_installed = functools.cache(config_module.is_installed)


def config_paths(pattern: str = '*vmamba*') -> list:
    """Paths of the zoo's configs of VMamba, without those in ``_base_``."""
    return sorted(path for folder in TASKS for path in (ROOT / 'configs' / folder).glob(f'{pattern}.py'))


def baseline_paths() -> list:
    """Paths of the configs of other backbones, which the installed packages lack."""
    return sorted(path for path in config_paths('*') if 'vmamba' not in path.name)


def ablation_paths() -> list:
    """Paths of the ablations' configs."""
    return sorted((ROOT / 'configs/ablation').glob('*.py'))


def arch_of(path: Path) -> str:
    """The arch that a config's name stands for, such as tiny-s1l8."""
    size, family = re.search(r'vmamba-(tiny|small|base|t|s|b)-(v0|m2|s\dl\d+)', path.name).groups()
    return f'{dict(t="tiny", s="small", b="base").get(size, size)}-{family}'


@functools.cache
def _read(path: Path) -> Config:
    return Config.fromfile(path)


def read(path: Path) -> Config:
    """A config as it is; each caller gets a copy."""
    return copy.deepcopy(_read(path))


def load(path: Path, **backbone) -> Config:
    """A config at small size: random weights, few proposals, small crops; backbone options may be replaced."""
    cfg = read(path)
    cfg.model.backbone.update(dict(init_cfg=None), **backbone)
    if cfg.default_scope == 'mmdet':
        cfg.model.train_cfg.rpn_proposal.max_per_img = 40
        cfg.model.train_cfg.rcnn.sampler.num = 16
        cfg.model.test_cfg.rpn.max_per_img = 40
        cfg.model.test_cfg.rcnn.update(max_per_img=10, score_thr=0.0)
    elif cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (SIDE, SIDE)
    return cfg


def build(cfg: Config) -> torch.nn.Module:
    """The model of a config, as a Runner on one CPU builds it."""
    init_default_scope(cfg.default_scope)
    registry = importlib.import_module(f'{cfg.default_scope}.registry').MODELS
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return revert_sync_batchnorm(registry.build(cfg.model))


def build_optimizer(model, cfg: Config):
    """The optimizer wrapper of a config; without the scaling of mixed precision, which needs a GPU."""
    options = dict(cfg.optim_wrapper, type='OptimWrapper')
    for key in ('loss_scale', 'dtype'):
        options.pop(key, None)
    return build_optim_wrapper(model, options)


def synthetic_data(cfg: Config, images: int = 2) -> dict:
    """Random images and annotations as the data loader of a config's codebase gives them."""
    make = dict(mmpretrain=_class_sample, mmdet=_box_sample, mmseg=_map_sample)[cfg.default_scope]
    return dict(
        inputs=[torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8) for _ in range(images)],
        data_samples=[make(SIDE) for _ in range(images)],
    )


def _class_sample(side):
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(torch.randint(0, 2, (1,)))


def _meta(side):
    return dict(
        img_id=1,
        img_path='',
        ori_shape=(side, side),
        img_shape=(side, side),
        pad_shape=(side, side),
        scale_factor=(1.0, 1.0),
        flip=False,
        flip_direction=None,
    )


def _box_sample(side):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    masks = torch.zeros(2, side, side, dtype=torch.uint8)
    masks[0, 4:30, 4:40] = masks[1, 20:60, 10:50] = 1
    sample = DetDataSample(metainfo=_meta(side))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[4.0, 4.0, 40.0, 30.0], [10.0, 20.0, 50.0, 60.0]]),
        labels=torch.tensor([0, 1]),
        masks=BitmapMasks(masks.numpy(), side, side),
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample


def _map_sample(side):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=_meta(side))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, side, side)))
    return sample
