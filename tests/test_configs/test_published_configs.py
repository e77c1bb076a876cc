"""Config files of VMamba's shape, over the installed Swin configs, build, load and train as they are."""

import json
import math
import re
from pathlib import Path

import mmdet
import mmseg
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmvmamba import MM_VSSM
from tests.test_configs.zoo import build
from tests.test_tools.conftest import load_tool, runner_in

TINY = """dims=96,
        depths=(2, 2, 5, 2),
        ssm_d_state=1,
        ssm_dt_rank="auto",
        ssm_ratio=2.0,
        ssm_conv=3,
        ssm_conv_bias=False,
        forward_type="{forward_type}",
        mlp_ratio=4.0,
        downsample_version="v3",
        patchembed_version="v2",
        drop_path_rate=0.2,
"""
LATE = TINY.format(forward_type='v05_noz') + '        norm_layer="ln2d",'
EARLY = TINY.format(forward_type='v3noz') + '        ssm_rank_ratio=2.0,'
BASE = LATE.replace('dims=96', 'dims=128').replace('drop_path_rate=0.2', 'drop_path_rate=0.6')
VANILLA = """dims=96,
        depths=(2, 2, 9, 2),
        ssm_d_state=16,
        ssm_dt_rank="auto",
        ssm_ratio=2.0,
        mlp_ratio=0.0,
        downsample_version="v1",
        patchembed_version="v1","""
FIRST = 'depths=(2, 2, 9, 2),\n        dims=96,'
# name: (folder of configs, Swin's config, type, out_indices, options)
CONFIGS = {
    'mask_rcnn_tiny': ('mmdet', 'mask-rcnn_swin-t-p4-w7_fpn_1x_coco', 'MM_VSSM', (0, 1, 2, 3), EARLY),
    'mask_rcnn_first': ('mmdet', 'mask-rcnn_swin-t-p4-w7_fpn_1x_coco', 'MMDET_VSSM', (0, 1, 2, 3), FIRST),
    'mask_rcnn_tiny_ms_3x': ('mmdet', 'mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco', 'MM_VSSM', (0, 1, 2, 3), LATE),
    'mask_rcnn_tiny_amp': ('mmdet', 'mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco', 'MM_VSSM', (0, 1, 2, 3), VANILLA),
    'retinanet_tiny': ('mmdet', 'retinanet_swin-t-p4-w7_fpn_1x_coco', 'MM_VSSM', (1, 2, 3), LATE),
    'upernet_tiny': ('mmseg', 'swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512')
    + ('MM_VSSM', (0, 1, 2, 3), EARLY),
    'upernet_small': ('mmseg', 'swin-small-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512')
    + ('MM_VSSM', (0, 1, 2, 3), VANILLA),
    'upernet_base': ('mmseg', 'swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512')
    + ('MM_VSSM', (0, 1, 2, 3), BASE),
}
SCOPES = dict(mmdet=mmdet, mmseg=mmseg)
SIDE = 64


def write(folder, name, pretrained='', custom_imports=False) -> Path:
    """A config in VMamba's own folder layout: its file, beside copies of Swin's and ``_base_``."""
    scope, swin, kind, out_indices, options = CONFIGS[name]
    configs = folder / 'configs'
    (configs / 'vssm1').mkdir(parents=True)
    for part in ('_base_', 'swin'):
        (configs / part).symlink_to(Path(SCOPES[scope].__file__).parent / '.mim/configs' / part)
    path = configs / 'vssm1' / f'{name}.py'
    path.write_text(
        f"_base_ = [\n    '../swin/{swin}.py'\n]\n"
        + ("custom_imports = dict(imports=['mmvmamba'])\n" if custom_imports else '')
        + '\nmodel = dict(\n    backbone=dict(\n'
        + f'        type=\'{kind}\',\n        out_indices={out_indices},\n        pretrained="{pretrained}",\n'
        + f'        {options}\n    ),\n)\n\n# train_dataloader = dict(batch_size=2) # as gpus=8\n'
    )
    return path


def write_weights(folder, path) -> str:
    """An official classifier's file for the backbone of a config."""
    options = dict(Config.fromfile(path).model.backbone)
    if options.pop('type') == 'MMDET_VSSM':
        options.update(mlp_ratio=0.0, forward_type='v0', downsample_version='v1', patchembed_version='v1')
    with torch.device('meta'):
        model = MM_VSSM(**{**options, 'out_indices': (3,), 'pretrained': None})
    state = model.to_empty(device='cpu').state_dict()
    state = {key.replace('outnorm3.', 'classifier.norm.'): torch.full_like(value, 0.01) for key, value in state.items()}
    weights = folder / 'ckpt_epoch_262.pth'
    torch.save(dict(model=state), weights)
    return str(weights)


def write_data(folder) -> None:
    """Two pictures where the installed configs expect COCO and ADE20K."""
    for name in ('data/coco/train2017', 'data/coco/annotations'):
        (folder / name).mkdir(parents=True)
    ade = folder / 'data/ade/ADEChallengeData2016'
    for name in ('images', 'annotations'):
        (ade / name / 'training').mkdir(parents=True)
    rng, images, boxes = np.random.default_rng(0), [], []
    for i in (1, 2):
        picture = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        picture.save(folder / f'data/coco/train2017/{i}.jpg')
        picture.save(ade / f'images/training/{i}.jpg')
        Image.fromarray(rng.integers(0, 151, (SIDE, SIDE), dtype=np.uint8)).save(ade / f'annotations/training/{i}.png')
        images.append(dict(id=i, file_name=f'{i}.jpg', width=SIDE, height=SIDE))
        polygon = [[8, 8, 48, 8, 48, 48, 8, 48]]
        boxes.append(
            dict(id=i, image_id=i, category_id=1, bbox=[8, 8, 40, 40], area=1600, iscrowd=0, segmentation=polygon)
        )
    content = dict(images=images, annotations=boxes, categories=[dict(id=1, name='person')])
    (folder / 'data/coco/annotations/instances_train2017.json').write_text(json.dumps(content))


def small_run(name) -> list:
    """Settings of a short run of small images on one processor; the model and its file stay as they are."""
    scope, swin, *_ = CONFIGS[name]
    pipeline, size = 'train_dataloader.dataset.pipeline', f'({SIDE},{SIDE})'
    settings = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
    settings += ['default_hooks.logger.interval=1', 'default_hooks.checkpoint.save_last=False']
    if scope == 'mmseg':
        settings += [f'{pipeline}.2.scale={size}', f'{pipeline}.3.crop_size={size}', 'train_cfg.max_iters=1']
        return [*settings, f'model.data_preprocessor.size={size}']
    settings += ['train_cfg.max_epochs=1', 'default_hooks.checkpoint.interval=100', 'optim_wrapper.type=OptimWrapper']
    settings += ['model.train_cfg.rpn_proposal.max_per_img=40'] if 'mask-rcnn' in swin else []
    if 'ms-crop' not in swin:
        return [*settings, f'{pipeline}.2.scale={size}']
    choices = f'{pipeline}.3.transforms'
    places = (f'{choices}.0.0.scales', f'{choices}.1.0.scales', f'{choices}.1.2.scales')
    return [*settings, *(f'{place}=[{size}]' for place in places), f'{choices}.1.1.crop_size=(32,48)']


@pytest.mark.parametrize('name', CONFIGS)
def test_it_builds(name, tmp_path):
    path = write(tmp_path, name)
    options = Config.fromfile(path).model.backbone
    assert {'embed_dims', 'num_heads', 'window_size', 'qkv_bias', 'init_cfg'} <= set(options)
    with torch.device('meta'):
        backbone = build(Config.fromfile(path)).backbone
    assert isinstance(backbone, MM_VSSM) and backbone.init_cfg is None
    assert backbone.arch.mlp_ratio == (0 if CONFIGS[name][-1] in (VANILLA, FIRST) else 4)


def test_an_unknown_key_is_an_error(tmp_path):
    path = write(tmp_path, 'upernet_tiny')
    path.write_text(path.read_text().replace('ssm_d_state', 'ssm_dstate'))
    with pytest.raises(TypeError, match='MM_VSSM has no option ssm_dstate'):
        build(Config.fromfile(path))


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_it_loads_and_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    weights = write_weights(tmp_path, write(tmp_path / 'first', name))
    path, work = write(tmp_path, name, weights), tmp_path / 'work'
    options = ['--work-dir', str(work), '--no-validate', '--cfg-options', *small_run(name)]
    assert load_tool('train.py').main([str(path), *options]) == 0
    assert_trained(work, weights)


def assert_trained(work, weights) -> None:
    (log,) = work.glob('2*/*.log')
    text = log.read_text()
    (loss,) = re.findall(r' loss: (\S+)', text)
    assert math.isfinite(float(loss)) and float(loss) > 0
    assert f'weights from model of {weights}' in text
    lines = [line for line in text.splitlines() if '_VSSM ignores ' in line and 'embed_dims' in line]
    assert len(lines) == 1 and all(word in lines[0] for word in ('num_heads', 'window_size', 'init_cfg'))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['retinanet_tiny', 'upernet_tiny'])
def test_it_trains_through_mim(name, tmp_path):
    write_data(tmp_path)
    weights = write_weights(tmp_path, write(tmp_path / 'first', name))
    path, work = write(tmp_path, name, weights, custom_imports=True), tmp_path / 'work'
    no_validation = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
    scope = dict(mmdet='mmdet', mmseg='mmsegmentation')[CONFIGS[name][0]]
    command = f'python -m mim train {scope} {path} --gpus 0 --work-dir {work} --cfg-options'
    runner_in(tmp_path)(command, *small_run(name), *no_validation)
    assert_trained(work, weights)
