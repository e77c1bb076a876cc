"""Label every pixel of a scene: `mim train mmsegmentation configs/demo/vmamba-nano_upernet_1xb4-4k_digits-128x128.py`.

The heads are narrower than the standard ones, so that a CPU trains them in minutes.
"""

_base_ = ['mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py']

data_root = 'data/digits/'
metainfo = dict(
    classes=['background', *[str(digit) for digit in range(10)]],
    palette=[
        [0, 0, 0],
        [230, 25, 75],
        [60, 180, 75],
        [255, 225, 25],
        [0, 130, 200],
        [245, 130, 48],
        [145, 30, 180],
        [70, 240, 240],
        [240, 50, 230],
        [210, 245, 60],
        [250, 190, 212],
    ],
)
norm_cfg = dict(type='BN', requires_grad=True)
class_weight = [0.3] + [1.0] * 10  # most pixels are background
# smaller scenes are padded with background: mmseg's weighted loss takes no ignored pixels
data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3, size=(128, 128), seg_pad_val=0)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(_delete_=True, type='mmvmamba.VSSMBackbone', arch='nano'),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=32,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight, avg_non_ignore=True),
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=32,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight, avg_non_ignore=True),
    ),
)

dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    data_prefix=dict(img_path='scenes/train', seg_map_path='semantic/train'),
    img_suffix='.png',
    metainfo=metainfo,
)
# without augmentation, so the same for both; the name is what mmseg's inference and tools look for
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(dataset, pipeline=test_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        dataset,
        data_prefix=dict(img_path='scenes/val', seg_map_path='semantic/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=ratio, keep_ratio=True) for ratio in (0.75, 1.0, 1.25)],
            [dict(type='RandomFlip', prob=0.0, direction='horizontal')],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]

iterations = 4000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=2000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='mmvmamba.FastOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, end=iterations // 8, by_epoch=False),
    dict(type='CosineAnnealingLR', begin=iterations // 8, T_max=iterations - iterations // 8, by_epoch=False),
]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmvmamba.AtomicCheckpointHook', by_epoch=False, interval=2000, max_keep_ckpts=1, save_best='mIoU'
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook', interval=1),
)
randomness = dict(seed=0)
