"""The numbers in a config's name are the ones inside, and variants differ in what their name says only."""

import functools
import re

import pytest
from mmengine.config import Config

from tests.test_configs.zoo import TASKS, arch_of, config_paths, read

PATHS = config_paths()
CHANNELS = dict(tiny=[96, 192, 384, 768], small=[96, 192, 384, 768], base=[128, 256, 512, 1024])


def ids(path):
    return path.stem


def test_the_published_rows_are_there():
    names = {path.stem for path in PATHS}
    archs = [f'{size}-{family}' for size in ('tiny', 'small', 'base') for family in ('v0',)]
    archs += ['tiny-s2l5', 'small-s2l15', 'base-s2l15', 'tiny-s1l8', 'small-s1l20', 'base-s1l20']
    for arch in archs:
        size, family = arch.split('-')
        rows = [f'vmamba-{arch}_8xb128{{}}_in1k', f'mask-rcnn_vmamba-{size[0]}-{family}_fpn_{{}}1x_coco']
        crops = (512, 640, 896) if size == 'small' else (512,)
        rows += [f'vmamba-{arch}-in1k-pre_upernet_4xb4{{}}-160k_ade20k-{crop}x{crop}' for crop in crops]
        if size != 'base':
            rows.append(f'mask-rcnn_vmamba-{size[0]}-{family}_fpn_{{}}ms-crop-3x_coco')
        for row in rows:
            amp = 'amp-' if '{}1x' in row or '{}ms' in row else '-amp'
            assert {row.format(''), row.format(amp)} <= names
    assert {f'vmamba-{size}-m2_8xb128_in1k' for size in ('tiny', 'small', 'base')} <= names
    assert 'mask-rcnn_vmamba-b-s2l15_fpn_8xb1-1x_coco' in names
    assert sum('custom' in name for name in names) == 3


@pytest.mark.parametrize('path', PATHS, ids=ids)
def test_numbers_in_the_name(path):
    cfg = read(path)
    arch, name = arch_of(path), path.stem
    size = arch.split('-')[0]
    assert TASKS[path.parent.name] == cfg.default_scope
    assert cfg.model.backbone.type == 'mmvmamba.VSSMBackbone' and cfg.model.backbone.arch == arch
    assert cfg.vmamba.arch == arch and cfg.vmamba.channels == CHANNELS[size]

    batch = re.search(r'(\d+)xb(\d+)', name)
    gpus, images = (int(batch[1]), int(batch[2])) if batch else (8, 2)  # mmdet's convention: 8x2 unless it is said
    assert cfg.train_dataloader.batch_size == images
    if 'custom' not in name:
        assert cfg.auto_scale_lr.base_batch_size == gpus * images
    wrapper = 'mmvmamba.FastOptimWrapper' if 'amp' in name else 'AmpOptimWrapper' if 'fsdp' in name else 'OptimWrapper'
    assert cfg.optim_wrapper.get('type', 'OptimWrapper') == wrapper
    assert ('amp' in name or 'fsdp' in name) == (cfg.optim_wrapper.get('dtype') == 'float16')
    assert ('fsdp' in name) == (cfg.get('runner_type') == 'FlexibleRunner')

    if cfg.default_scope == 'mmpretrain':
        epochs = int(re.search(r'-(\d+)e_', name)[1]) if 'custom' in name else 300
        assert cfg.train_cfg.max_epochs == epochs and cfg.model.head.in_channels == CHANNELS[size][-1]
    elif cfg.default_scope == 'mmdet':
        assert cfg.train_cfg.max_epochs == (36 if '3x' in name else 12)
        assert cfg.param_scheduler[1].milestones == ([27, 33] if '3x' in name else [8, 11])
        assert cfg.param_scheduler[0].end == 1000 and cfg.model.neck.in_channels == CHANNELS[size]
    else:
        iterations = 1000 * int(re.search(r'-(\d+)k_', name)[1])
        crop = int(re.search(r'-(\d+)x\1$', name)[1])
        assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == iterations
        assert cfg.model.data_preprocessor.size == (crop, crop)
        steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
        assert steps['RandomCrop'].crop_size == (crop, crop) and steps['RandomResize'].scale == (4 * crop, crop)
        assert cfg.test_dataloader.dataset.pipeline[1].scale == (4 * crop, crop)
        assert cfg.model.decode_head.in_channels == CHANNELS[size]
        assert cfg.model.auxiliary_head.in_channels == CHANNELS[size][2]


@pytest.mark.parametrize('path', [path for path in PATHS if 'amp' in path.stem], ids=ids)
def test_mixed_precision_changes_how_a_step_runs_only(path):
    mixed, full = read(path), read(path.with_name(re.sub(r'-amp|amp-', '', path.name)))
    hook = [hook for hook in mixed.custom_hooks if hook.type == 'mmvmamba.CompileHook']
    assert len(hook) == 1 and hook[0].get('dynamic', False) == (mixed.default_scope == 'mmdet')
    assert mixed.default_hooks.runtime_info == dict(type='mmvmamba.DeferredInfoHook')
    assert mixed.optim_wrapper.optimizer.fused and mixed.train_dataloader.pin_memory
    if mixed.default_scope == 'mmdet':
        divisor = mixed.model.data_preprocessor.pad_size_divisor
        collate = dict(type='mmvmamba.pad_masks_collate', pad_size_divisor=divisor)
        assert mixed.train_dataloader.collate_fn == collate
    assert mixed.pop('model_wrapper_cfg') == dict(broadcast_buffers=False, gradient_as_bucket_view=True)
    for cfg in (mixed, full):
        for key in ('type', 'dtype'):
            cfg.optim_wrapper.pop(key, None)
        cfg.optim_wrapper.optimizer.pop('fused', None)
        cfg.default_hooks.pop('runtime_info', None)
        for key in ('pin_memory', 'num_workers', *(['collate_fn'] if cfg.default_scope == 'mmdet' else [])):
            cfg.train_dataloader.pop(key, None)
        cfg.env_cfg.pop('cudnn_benchmark')
        cfg.get('data_preprocessor', {}).pop('type', None)
        hooks = [hook for hook in cfg.get('custom_hooks') or [] if not hook.type.startswith('mmvmamba.')]
        cfg.custom_hooks = hooks
    assert mixed._cfg_dict == full._cfg_dict


@pytest.mark.parametrize('path', [path for path in PATHS if 'custom' not in path.stem], ids=ids)
def test_published_recipe(path):
    cfg = read(path)
    optimizer = cfg.optim_wrapper.optimizer
    lr, decay = dict(mmpretrain=(1e-3, 0.05), mmdet=(1e-4, 0.05), mmseg=(6e-5, 0.01))[cfg.default_scope]
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, decay)
    if cfg.default_scope == 'mmpretrain':
        assert cfg.optim_wrapper.clip_grad.max_norm == 5.0 and cfg.model.head.loss.label_smooth_val == 0.1
        assert [augment.type for augment in cfg.model.train_cfg.augments] == ['Mixup', 'CutMix']
        assert (cfg.param_scheduler[0].end, cfg.param_scheduler[1].type) == (20, 'CosineAnnealingLR')
        assert {'RandAugment', 'RandomErasing'} <= {step.type for step in cfg.train_dataloader.dataset.pipeline}
        average = [hook for hook in cfg.custom_hooks if hook.type == 'EMAHook']
        assert not average if 'fsdp' in path.stem else average[0].momentum == 1e-4
        assert 'init_cfg' not in cfg.model.backbone
    else:
        assert cfg.optim_wrapper.paramwise_cfg.custom_keys.norm.decay_mult == 0.0
        checkpoint = cfg.vmamba.checkpoint
        if cfg.vmamba.arch == 'base-v0':
            checkpoint = cfg.vmamba.earlier_checkpoint
            assert checkpoint.endswith('/vssmbase_dp05_ckpt_epoch_260.pth')
        assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=checkpoint)
    if cfg.default_scope == 'mmseg':
        ratios = [step.scale_factor for step in cfg.tta_pipeline[1].transforms[0]]
        assert ratios == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75] and len(cfg.tta_pipeline[1].transforms[1]) == 2


def test_drop_path_of_the_archs_is_the_published_one():
    from mmvmamba.models import ARCHS

    published, others = {'tiny': 0.2, 'small': 0.3, 'base': 0.6}, {'base-s1l20': 0.5, 'base-m2': 0.3}
    for arch, options in ARCHS.items():
        if arch != 'nano':
            assert options['drop_path_rate'] == others.get(arch, published[arch.split('-')[0]])


def test_configs_are_thin():
    """No copied trees: a config is a few lines over an installed one."""
    for path in PATHS:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) <= (70 if 'custom' in path.stem else 20), path


@pytest.mark.parametrize('path', [path for path in PATHS if 'custom' in path.stem], ids=ids)
def test_custom_configs_change_classes_in_one_place(path):
    text = path.read_text()
    classes = re.search(r'^classes = (.*)$', text, re.MULTILINE)[0]
    changed = text.replace(classes, "classes = ['a', 'b', 'c', 'd', 'e']").replace("'./", f"'{path.parent}/")
    cfg = Config.fromstring(changed, '.py')
    heads = dict(
        mmpretrain=['model.head', 'data_preprocessor'],
        mmdet=['model.roi_head.bbox_head', 'model.roi_head.mask_head'],
        mmseg=['model.decode_head', 'model.auxiliary_head'],
    )[cfg.default_scope]
    for head in heads:
        assert functools.reduce(getattr, head.split('.'), cfg).num_classes == 5
    assert path.with_name('README.md').read_text().count(path.name) == 2
