"""Your own classes: the place to start.

Put the images into ``data/custom/train/`` and ``data/custom/val/``, COCO annotations with masks into
``data/custom/annotations/``, and name the classes below as the annotations do.
"""

_base_ = './mask-rcnn_vmamba-t-s1l8_fpn_1x_coco.py'

classes = ('cat', 'dog')
data_root = 'data/custom/'

num_classes = len(classes)
metainfo = dict(classes=classes)
model = dict(
    roi_head=dict(bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes)),
)
train_dataloader = dict(
    dataset=dict(
        data_root=data_root, metainfo=metainfo, ann_file='annotations/train.json', data_prefix=dict(img='train/')
    )
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, ann_file='annotations/val.json', data_prefix=dict(img='val/'))
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
# the learning rate is for 16 images an iteration; this scales it to the number of GPUs in use
auto_scale_lr = dict(enable=True)
