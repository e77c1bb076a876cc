"""Your own classes: the place to start.

Put the images into ``data/custom/images/{train,val}/`` and label maps of the same names (PNG, the value of a pixel is
the number of its class, 255 is ignored) into ``data/custom/labels/{train,val}/``, and name the classes below.
"""

_base_ = './vmamba-tiny-s1l8-in1k-pre_upernet_4xb4-160k_ade20k-512x512.py'

classes = ['background', 'cat', 'dog']
palette = [[0, 0, 0], [230, 25, 75], [60, 180, 75]]
data_root = 'data/custom'

num_classes = len(classes)
metainfo = dict(classes=classes, palette=palette)
iterations = 20000
model = dict(decode_head=dict(num_classes=num_classes), auxiliary_head=dict(num_classes=num_classes))
# label 0 is a class here, unlike in ADE20K
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=_base_.crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
        metainfo=metainfo,
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(img_path='images/val', seg_map_path='labels/val'),
        metainfo=metainfo,
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=iterations, val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=500, end=iterations, by_epoch=False),
]
# the learning rate is for 16 images an iteration; this scales it to the number of GPUs in use
auto_scale_lr = dict(enable=True)
