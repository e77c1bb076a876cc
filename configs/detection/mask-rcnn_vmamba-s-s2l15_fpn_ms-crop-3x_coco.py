_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py', '../_base_/vmamba-small-s2l15.py']

pretrained = _base_.vmamba.checkpoint
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvmamba.VSSMBackbone',
        arch=_base_.vmamba.arch,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=_base_.vmamba.channels),
)
