"""Semantic FPN on an output stride of 8."""

_base_ = ['mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py', '../_base_/vmamba-tiny-s1l8.py']

strides = [4, 8, 8, 8]
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmvmamba.VSSMBackbone',
        arch=_base_.vmamba.arch,
        strides=(1, 2, 1, 1),
        init_cfg=dict(type='Pretrained', checkpoint=_base_.vmamba.checkpoint),
    ),
    neck=dict(in_channels=_base_.vmamba.channels),
    decode_head=dict(feature_strides=strides),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.01),
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)
