"""Your own classes: the place to start.

Put the images into ``data/custom/train/<class>/`` and ``data/custom/val/<class>/``, and name the classes below.
"""

_base_ = './vmamba-tiny-s1l8_8xb128_in1k.py'

classes = ['cat', 'dog']
data_root = 'data/custom'

num_classes = len(classes)
epochs = 50
model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=_base_.vmamba.checkpoint)),
    head=dict(num_classes=num_classes),
)
data_preprocessor = dict(num_classes=num_classes)
train_dataloader = dict(
    batch_size=64,
    drop_last=False,  # a small data set may have a single batch
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        classes=classes,
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val',
        classes=classes,
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=1)
test_evaluator = val_evaluator

# the weights are trained already: fewer epochs, smaller steps, and no slow average
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=5),
]
train_cfg = dict(max_epochs=epochs)
auto_scale_lr = dict(base_batch_size=64)
custom_hooks = []
