"""The demo's classifier at 64 pixels, for what a map of one pixel cannot show: accuracy against test resolution.

As on ImageNet, training crops differ in scale; the last map is 2x2.
"""

_base_ = './vmamba-nano_1xb64_digits-32px.py'

side = 64
epochs = 12
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=side, crop_ratio_range=(0.4, 1.0), interpolation='bicubic'),
    dict(type='Rotate', angle=12.0, prob=0.5, random_negative_prob=0.5, pad_val=0),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=side, interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, end=epochs // 4, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=epochs // 4, T_max=epochs - epochs // 4, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(interval=epochs))
