"""Classify single digits: `mim train mmpretrain configs/demo/vmamba-nano_1xb64_digits-32px.py`."""

_base_ = ['mmpretrain::_base_/default_runtime.py']

data_root = 'data/digits/'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=10, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
    backbone=dict(type='mmvmamba.VSSMBackbone', arch='nano', out_indices=(3,), drop_path_rate=0.1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=256,
        topk=(1,),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
    ),
)

dataset = dict(
    type='CustomDataset',
    data_root=data_root + 'classification',
    data_prefix='train',
    classes=[str(digit) for digit in range(10)],
)
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        dataset,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=32, padding=3),
            dict(type='Rotate', angle=12.0, prob=0.5, random_negative_prob=0.5, pad_val=0),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, data_prefix='val', pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator

epochs = 20
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=5)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type='mmvmamba.FastOptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, end=epochs // 4, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=epochs // 4, T_max=epochs - epochs // 4, convert_to_iter_based=True),
]
default_hooks = dict(
    visualization=dict(resize=224),  # so that the drawn labels can be read
    logger=dict(interval=10),
    checkpoint=dict(type='mmvmamba.AtomicCheckpointHook', interval=5, max_keep_ckpts=1, save_best='accuracy/top1'),
)
visualizer = dict(vis_backends=[dict(type='LocalVisBackend')])
randomness = dict(seed=0)
