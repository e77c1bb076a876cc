_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/vmamba-base-v0.py']

pretrained = _base_.vmamba.earlier_checkpoint
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvmamba.VSSMBackbone',
        arch=_base_.vmamba.arch,
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained),
    ),
    neck=dict(in_channels=_base_.vmamba.channels),
)
