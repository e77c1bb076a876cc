"""Your own classes at 384 pixels: images under data/custom/train/<class>/ and data/custom/val/<class>/."""

_base_ = '../classification/vmamba-tiny-s1l8_1xb64-50e_custom.py'

size = 384
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=size, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(constructor='mmvmamba.LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.8))
train_cfg = dict(max_epochs=30)
